"""Agents as rollouts: a program or a function is given a session; its answer, its failures and its limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.agents import agent_config, make_agent_model, params, running_gateway

from rltrain.agents.gateway import server
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.session import Session
from rltrain.agents.program import clean, files_of
from rltrain.agents.rollout import run_command, run_function
from rltrain.arguments.config import Config
from rltrain.inputs import check_agents
from rltrain.rollout.generate.http import GenerationError
from rltrain.run.errors import UserError
from rltrain.sample import Sample

# The standard library speaks HTTP, too: the first import of a client takes longer than these tests.
AGENT = """
import json, os, sys, urllib.request
given = json.loads(sys.stdin.readline())
assert "label" not in given, given

def ask(*messages, **more):
    body = {"model": given["model"], "messages": [{"role": "user", "content": each} for each in messages], **more}
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]

exec(given["metadata"]["do"])
"""
ASK_AND_ANSWER = 'print("thinking"); print("the answer:", ask(given["prompt"]), "\\n")'


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("agent")
    make_agent_model(directory / "model")
    (directory / "program").mkdir()
    (directory / "program" / "agent.py").write_text(AGENT)
    return directory


@pytest.fixture
def rollout(directory: Path, parsers: Parsers) -> Callable[..., Any]:
    """One rollout; returns its samples and the engine, which says the given texts."""

    def run(do: str, *flags: str, says: list[Any] = [], faults: list[Any] = [], **metadata: Any) -> Any:  # noqa: B006
        if not any("function" in flag for flag in flags):
            flags = ("--agent-command", f"python {directory / 'program' / 'agent.py'}", *flags)
        config = agent_config(directory / "model", directory, "--rm-type", "f1", *flags)
        check_agents(config.agents)

        async def main() -> Any:
            async with running_gateway(config, parsers) as (gateway, engine):
                server.set_gateway(gateway)
                engine.says, engine.faults = list(says), list(faults)
                sample = Sample(index=7, prompt="task", label="42", metadata={"do": do, **metadata})
                way = run_command if config.agents.agent_command else run_function
                try:
                    samples = await way(config.namespace, sample, params(config))
                finally:
                    server.set_gateway(None)
                assert gateway.session_count == 0
                return samples, engine

        return asyncio.run(main())

    return run


@pytest.mark.parametrize("sandbox", ["bubblewrap", "none"])
def test_a_program_asks_and_its_last_line_is_graded(rollout: Any, sandbox: str) -> None:
    (sample,), _ = rollout(ASK_AND_ANSWER, "--agent-sandbox", sandbox, says=["42"])
    assert sample.response == "42<|im_end|>" and sample.reward == pytest.approx(
        2 / 3
    )  # f1 of "the answer: 42"
    assert sample.status is Sample.Status.COMPLETED and sample.rollout_id == 7
    record = sample.metadata["agent"]
    assert record["answer"] == "the answer: 42" and record["failure"] == "" and record["exit_code"] == 0
    assert record["stdout"].startswith("thinking\n") and record["printed_bytes"] == 26
    assert [turn["origin"] for turn in sample.metadata["agent_session"]["turns"]] == ["root"]


def test_files_of_the_prompt_and_a_file_as_the_answer(rollout: Any) -> None:
    do = 'ask("x"); text = open("work/a.txt").read(); open("work/a.txt", "w").write(text + "42")'
    (sample,), _ = rollout(do, "--agent-answer", "work/a.txt", files={"work/a.txt": "is "})
    assert sample.metadata["agent"]["answer"] == "is 42"
    (sample,), _ = rollout('ask("x"); print(42)', "--agent-answer", "none.txt")
    assert (sample.metadata["agent"]["answer"], sample.reward) == ("", 0)


FAILURES = {
    "exit": ('ask("x"); print(42); sys.exit(3)', "exit code 3", "completed"),
    "raise": ('ask("x"); raise ValueError("oh")', "exit code 1", "completed"),
    "hang": ('ask("x"); import time; time.sleep(600)', "it took longer than 8 s", "truncated"),
    "memory": ('ask("x"); held = bytearray(400 << 20)', "exit code 1", "completed"),
    "killed": ('ask("x"); import signal; os.kill(0, signal.SIGKILL)', "ended by signal 9", "completed"),
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.slow] if how == "hang" else []) for how in FAILURES]
)
def test_an_agent_s_own_failure_is_a_sample_with_its_reason(rollout: Any, how: str) -> None:
    do, failure, status = FAILURES[how]
    seconds = "8" if how == "hang" else "60"
    (sample,), _ = rollout(do, "--agent-timeout", seconds, "--agent-memory", "200")
    assert sample.metadata["agent"]["failure"] == failure
    assert (sample.status.value, sample.reward, sample.metadata["agent"]["answer"]) == (status, 0, "")
    if how == "raise":
        assert sample.metadata["agent"]["stderr"].rstrip().endswith("ValueError: oh")


def test_an_agent_that_asks_for_nothing_fails_its_sample(rollout: Any) -> None:
    (sample,), _ = rollout("print(42)")
    assert sample.failure == "the agent asked for no response: it ended without an error"
    (sample,), _ = rollout("sys.exit(3)")
    assert sample.failure == "the agent asked for no response: exit code 3"
    assert sample.status is Sample.Status.FAILED and sample.metadata["agent"]["exit_code"] == 3


def test_limits_of_turns_and_tokens_hold(rollout: Any) -> None:
    do = """
n = 0
try:
    while n < 9:
        ask("x" * n); n += 1
except Exception as error:
    print(n, error.code, json.load(error)["error"]["code"])
"""
    samples, _ = rollout(do, "--agent-max-turns", "3")
    assert len(samples) == 3 and samples[0].metadata["agent"]["answer"] == "3 403 session_limit"
    assert [sample.reward for sample in samples] == [samples[0].reward] * 3  # graded once, for all
    samples, _ = rollout(do, "--agent-max-tokens", "7")
    assert sum(sample.response_length for sample in samples) == 7


def test_engines_that_fail_are_no_failure_of_the_agent(rollout: Any) -> None:
    (sample,), engine = rollout(ASK_AND_ANSWER, faults=[400], says=["42"])
    assert sample.metadata["agent"]["answer"] == "the answer: 42" and len(engine.requests) == 2
    with pytest.raises(GenerationError, match=r"no agent could be run in 2 tries; the last error: .*400"):
        rollout(ASK_AND_ANSWER, "--agent-retries", "1", faults=[400] * 9)
    with pytest.raises(GenerationError, match=r"no agent could be run .*the sandbox did not start"):
        rollout(ASK_AND_ANSWER, "--agent-sandbox", "pyxis", "--agent-image", "x", "--agent-retries", "0")


def test_what_a_program_prints_is_bounded_and_harmless(rollout: Any) -> None:
    do = 'ask("x"); sys.stdout.buffer.write(b"\\x1b[2J\\xff\\0" * 99999); print("\\x1b]0;title\\a<b>")'
    (sample,), _ = rollout(do)
    record = sample.metadata["agent"]
    assert record["printed_bytes"] > 500_000 and len(record["stdout"]) <= 4096
    assert not set("\x1b\0\a") & set(json.dumps(record, ensure_ascii=False) + record["stdout"])
    assert clean(b"a\x1b[31m\n\tb\xff") == "a\ufffd[31m\n\tb\ufffd"


async def answering(session: Session, sample: Sample) -> Any:
    """An agent as a function; its sample says what it does."""
    import openai

    async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        done = await client.chat.completions.create(
            model=session.model, messages=[{"role": "user", "content": "x"}]
        )
    if sample.metadata["do"] == "hang":
        await asyncio.sleep(600)
    if sample.metadata["do"] == "raise":
        raise ValueError("oh")
    return {"text": done.choices[0].message.content, "number": 0.25, "nothing": None}[sample.metadata["do"]]


@pytest.mark.slow
def test_a_function_is_an_agent_too(rollout: Any) -> None:
    flags = ("--agent-function-path", "test_agent_rollout.answering")
    (sample,), _ = rollout("text", *flags, says=["42"])
    assert (sample.metadata["agent"]["answer"], sample.reward) == ("42", 1.0)
    assert rollout("number", *flags)[0][0].reward == 0.25
    failures = {
        "raise": "ValueError: oh",
        "nothing": "answering returned NoneType",
    }
    for do, failure in failures.items():
        (sample,), _ = rollout(do, *flags)
        assert failure in sample.metadata["agent"]["failure"] and sample.reward == 0
    (sample,), _ = rollout("hang", *flags, "--agent-timeout", "1")
    assert "it took longer than 1 s" in sample.metadata["agent"]["failure"] and sample.reward == 0


WRONG = {
    "--agent-command 'a": "No closing quotation",
    "--agent-python python": "--agent-python says how a program is run: add --agent-command",
    "--agent-timeout 5": "--agent-timeout needs --agent-command or --agent-function-path",
    "--agent-command a --custom-generate-function-path b.c": "and --custom-generate-function-path: each",
    "--agent-command a --agent-sandbox apptainer": "--agent-sandbox apptainer needs --agent-image",
    "--agent-command a --agent-image b": "bubblewrap takes no --agent-image",
    "--agent-command a --agent-max-turns 0": "--agent-max-turns is 0: it must be at least 1",
    "--agent-command no-such-program": "there is no program no-such-program in ",
    "--agent-command python --agent-files /no/file": "there is no /no/file",
    "--agent-command python no.py": "there is no no.py",
    "--agent-command python --agent-python /no/python": "--agent-python /no/python is not a program",
}


@pytest.mark.parametrize("flags", WRONG)
def test_what_can_t_be_right_is_refused_before_a_job_starts(flags: str, directory: Path) -> None:
    words = flags.split(" ")
    if words[0] == "--agent-command":  # its value is one word
        end = next((i for i, word in enumerate(words[1:], 1) if word.startswith("--")), len(words))
        words = [words[0], " ".join(words[1:end]), *words[end:]]
    with pytest.raises(UserError, match=WRONG[flags].replace("(", r"\(")):
        check_agents(agent_config(directory / "model", directory, *words).agents)


def test_the_flags_that_start_an_agent(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory / "program")
    config = agent_config(
        directory / "model", directory, "--agent-command", "python agent.py --say '{prompt} x'"
    )
    assert config.agents.agent_command == f"python {directory}/program/agent.py --say '{{prompt}} x'"
    assert config.agents.agent_gateway
    assert config.functions.custom_generate_function_path == "rltrain.agents.rollout.run_command"
    again = Config.from_values(config.values())
    from rltrain.arguments.resolve import resolve

    assert resolve(again).agents == config.agents  # a stored configuration is resolved once more


def test_files_that_lead_out_of_the_home() -> None:
    for path in ("/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="is outside the agent's home"):
            files_of(Sample(metadata={"files": {path: "x"}}))
