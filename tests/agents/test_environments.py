"""Environment packages: their tasks become the prompts, their rollout the agent, their score the reward."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.agents import agent_config, make_agent_model, params, running_gateway

from rltrain.agents.environments.prompts import prepare, with_reward
from rltrain.agents.gateway import server
from rltrain.agents.program import Outcome
from rltrain.agents.rollout import run_command
from rltrain.arguments.config import Config
from rltrain.inputs import check_agents
from rltrain.rewards.rules import asks_for_reward
from rltrain.rollout.base_types import RolloutFnEvalOutput
from rltrain.rollout.eval import eval_rollout
from rltrain.run.errors import UserError
from rltrain.sample import Sample

LEGS = ("--environment", "reasoning_gym/leg_counting")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("environment")
    make_agent_model(directory / "model")
    return directory


def configured(directory: Path, *more: str) -> Config:
    return agent_config(
        directory / "model", directory, "--prompt-data", str(directory / "tasks.jsonl"), *more
    )


def tasks(config: Config) -> list[dict[str, Any]]:
    prepare(config)
    assert config.data.prompt_data
    return [json.loads(line) for line in Path(config.data.prompt_data).read_text().splitlines()]


def play(config: Config, row: dict[str, Any], says: list[str]) -> list[Sample]:
    """One rollout of the task, with an engine that says this."""
    check_agents(config.agents)

    async def main() -> list[Sample]:
        async with running_gateway(config) as (gateway, engine):
            server.set_gateway(gateway)
            engine.says = list(says)
            sample = Sample(index=3, prompt=row["input"], metadata=row["metadata"])
            try:
                return await run_command(config.namespace, sample, params(config))
            finally:
                server.set_gateway(None)

    return asyncio.run(main())


@pytest.mark.slow
def test_tasks_of_reasoning_gym_are_prompts_played_and_scored(directory: Path) -> None:
    import reasoning_gym

    args = ("--environment-args", '{"size": 3, "max_animals": 4}')
    config = configured(directory, *LEGS, *args)
    rows = tasks(config)
    entries = list(reasoning_gym.create_dataset("leg_counting", seed=0, size=3, max_animals=4))
    assert [row["input"] for row in rows] == [entry["question"] for entry in entries]
    assert [row["metadata"]["environment"]["index"] for row in rows] == [0, 1, 2]
    assert not asks_for_reward(config)

    answer = entries[1]["answer"]
    (sample,) = play(config, rows[1], [f"I count <answer>{answer}</answer>"])
    assert sample.reward == 1 and sample.metadata["agent"]["failure"] == ""
    assert sample.response == f"I count <answer>{answer}</answer><|im_end|>"
    plain = configured(directory, *LEGS, *args, "--agent-sandbox", "none")
    (sample,) = play(plain, rows[1], ["<answer>no idea</answer>"])
    assert sample.reward is not None and sample.reward < 0.1

    before = (directory / "tasks.jsonl").read_bytes()
    assert tasks(config) == rows and (directory / "tasks.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="was not written for --environment reasoning_gym/leg_counting with"):
        prepare(configured(directory, *LEGS, "--environment-args", '{"size": 4}'))


@pytest.mark.slow
def test_evaluation_sets_are_written_and_played_too(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "sets.toml").write_text(f"""
[[eval.datasets]]
name = "sums"
path = "{tmp_path}/sums.jsonl"
environment = "reasoning_gym/basic_arithmetic"
environment_args = {{size = 1, seed = 5}}
""")
    config = configured(
        directory, *LEGS, "--environment-args", '{"size": 4}', "--prompt-data", str(tmp_path / "legs.jsonl"),
        "--eval-prompt-data", "held", str(tmp_path / "held.jsonl@[1:2]"),
        "--eval-environment-args", '{"size": 2, "seed": 1}', "--eval-interval", "1", "--agent-sandbox", "none",
        "--eval-config", str(tmp_path / "sets.toml"),
    )  # fmt: skip
    prepare(config)
    import reasoning_gym

    held = list(reasoning_gym.create_dataset("leg_counting", seed=1, size=2))
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert [row["input"] for row in rows] == [entry["question"] for entry in held]

    async def main() -> RolloutFnEvalOutput:
        async with running_gateway(config) as (gateway, _):
            server.set_gateway(gateway)
            try:
                return await eval_rollout(config, 0)
            finally:
                server.set_gateway(None)

    data = asyncio.run(main()).data
    assert {name: len(each["rewards"]) for name, each in data.items()} == {"held": 1, "sums": 1}
    for each in data.values():
        assert all(sample.metadata["agent"]["failure"] == "" for sample in each["samples"])
        assert all(sample.response == "done<|im_end|>" for sample in each["samples"])
    assert data["held"]["samples"][0].prompt == held[1]["question"]


@pytest.mark.slow
def test_evaluation_sets_that_can_t_be_right_are_refused(directory: Path, tmp_path: Path) -> None:
    ours = (*LEGS, "--environment-args", '{"size": 3, "max_animals": 4}')
    own = ("--eval-prompt-data", "own", str(tmp_path / "own.jsonl"))
    tasks(configured(directory, *ours))
    with pytest.raises(
        UserError, match=r"set own: it would use the training tasks.* --eval-environment-args"
    ):
        prepare(configured(directory, *ours, *own))
    prepare(configured(directory, *ours, "--eval-prompt-data", "own", f"{directory}/tasks.jsonl@[0:1]"))
    (tmp_path / "own.jsonl").write_text('{"input": "x", "label": "y"}\n')
    with pytest.raises(UserError, match=r"set own: .*own.jsonl was not written for --environment"):
        prepare(configured(directory, *ours, *own, "--eval-environment-args", '{"seed": 1}'))
    for text, message in (
        ('rm_type = "math"', "leave rm_type out"),
        ('environment_args = "x"', "it must be a table"),
        ('custom_generate_function_path = "a.b"\nenvironment = "reasoning_gym/x"', "function of its own"),
    ):
        (tmp_path / "sets.toml").write_text(f'[[eval.datasets]]\nname = "a"\npath = "a.jsonl"\n{text}\n')
        with pytest.raises(UserError, match=message):
            configured(directory, *ours, "--eval-config", str(tmp_path / "sets.toml"))
    (tmp_path / "sets.toml").write_text('[[eval.datasets]]\nname="a"\npath="a.jsonl"\nenvironment="x/y"\n')
    with pytest.raises(UserError, match="has environment, but the run has no --environment: give it"):
        configured(directory, "--eval-config", str(tmp_path / "sets.toml"))
    # A set that is not the environment's has its own way to be generated and graded.
    text = 'custom_generate_function_path = "rltrain.rollout.generate.single_turn.generate"\nrm_type = "math"'
    (tmp_path / "sets.toml").write_text(f'[[eval.datasets]]\nname = "a"\npath = "a.jsonl"\n{text}\n')
    config = configured(directory, *ours, "--eval-config", str(tmp_path / "sets.toml"))
    (plain,) = config.evaluation.eval_datasets
    assert "environment" not in plain and asks_for_reward(config.of_eval_set(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--environment", "reasoning_gym/no_such"), "reasoning_gym/no_such.*not registered"),
        ((*LEGS, "--environment-args", '{"sizes": 3}'), "unexpected keyword argument 'sizes'"),
        (("--environment", "legs"), "give verifiers/NAME or reasoning_gym/NAME"),
    ],
)
def test_what_can_t_be_loaded_is_said_before_the_start(
    directory: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(configured(directory, *flags, "--prompt-data", str(tmp_path / "tasks.jsonl")))
    assert not list(tmp_path.iterdir())


def with_fakes(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """These modules are found before those that are installed."""
    folder.mkdir()
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_what_a_package_prints_is_no_task(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = 'print("[nltk_data] Downloading")\ndef create_dataset(name, **args):\n    return [{"question": name}]\n'
    with_fakes(tmp_path / "fake", monkeypatch, reasoning_gym=fake)
    rows = tasks(configured(directory, *LEGS, "--prompt-data", str(tmp_path / "tasks.jsonl")))
    assert [row["input"] for row in rows] == ["leg_counting"]


def test_what_draws_is_imported_by_the_tasks_that_use_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes longer than most tasks; two modules of the package have it, as here."""
    game = """
import cellpylib as ours
import cellpylib
def create_dataset(name, **args):
    import sys
    before = "evolve" in vars(sys.modules["cellpylib"])
    return [{"question": f"{before} {ours.evolve()} {cellpylib.evolve()} {ours.evolve()}"}]
"""
    with_fakes(
        tmp_path / "fake", monkeypatch, reasoning_gym=game, cellpylib="def evolve():\n    return __name__\n"
    )
    rows = tasks(configured(directory, *LEGS, "--prompt-data", str(tmp_path / "tasks.jsonl")))
    assert [row["input"] for row in rows] == ["False cellpylib cellpylib cellpylib"]


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    directory: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "python"  # an interpreter without packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    flags = (*LEGS, "--agent-python", str(bare), "--prompt-data", str(tmp_path / "tasks.jsonl"))
    with pytest.raises(UserError, match=r"reasoning-gym is not installed in .* -m pip install reasoning-gym"):
        prepare(configured(directory, *flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*LEGS, "--rm-type", "math"), "leave --rm-type out"),
        ((*LEGS, "--agent-command", "python x.py"), "leave --agent-command out"),
        ((*LEGS, "--agent-answer", "x"), "leave --agent-answer out"),
        (("--environment-args", '{"size": 3}'), "--environment-args needs --environment"),
        (("--eval-environment-args", "{}"), "--eval-environment-args needs --environment"),
        ((*LEGS, "--eval-environment-args", "{}"), "--eval-environment-args needs --eval-prompt-data"),
    ],
)
def test_flags_that_contradict_it_are_refused(directory: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configured(directory, *flags)


def test_the_last_line_is_the_reward() -> None:
    good = with_reward(Outcome(answer='{"reward": 0.5, "metrics": {"turns": 2}}', said={"stdout": "x"}))
    assert good.reward == 0.5 and good.record()["metrics"] == {"turns": 2} and good.record()["stdout"] == "x"
    for said in ("", "done", "[]", '{"reward": NaN, "metrics": {}}', '{"reward": "a", "metrics": {}}'):
        bad = with_reward(Outcome(answer=said))
        assert bad.reward == 0 and "gave no reward" in bad.failure
    assert with_reward(Outcome(failure="exit code 1")) == Outcome(failure="exit code 1", reward=0.0)


GUESS = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str

class Guess(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(task.answer in trace.last_reply)

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)

class Config(vf.TasksetConfig):
    size: int = 3

class Tasks(vf.Taskset[Guess, Config]):
    def load(self):
        for i in range(self.config.size):
            yield Guess(Data(prompt=f"Say {i + 40}.", answer=str(i + 40)), self.config.task)

__all__ = ["Tasks"]
"""


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("sandbox", ["bubblewrap", "none"])
def test_a_task_set_of_verifiers(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, sandbox: str
) -> None:
    """The real package, in an environment of its own, which is made once: minutes."""
    root = tmp_path_factory.getbasetemp() / "verifiers"
    python = root / "bin" / "python"
    if not root.exists():
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "verifiers==0.4.0"], check=True)
        (packages,) = root.glob("lib/python*/site-packages")
        (packages / "guess_v1.py").write_text(GUESS)
    config = configured(
        directory, "--environment", "verifiers/guess-v1", "--environment-args", '{"taskset": {"size": 2}}',
        "--agent-python", str(python), "--prompt-data", str(directory / "guess.jsonl"), "--agent-sandbox", sandbox,
    )  # fmt: skip
    rows = tasks(config)
    assert [row["input"] for row in rows] == ["Say 40.", "Say 41."]
    for says, reward in (("41", 1), ("7", 0)):
        (sample,) = play(config, rows[1], [says])
        assert (sample.reward, sample.metadata["agent"]["failure"]) == (reward, "")
        assert sample.metadata["agent"]["metrics"] == {"turns": 1, "right": reward}
