"""Plays one task of an environment package, or lists its tasks; run by path, in the Python that has the package.

python bridge.py prompts    {"name": …, "args": {…}} on standard input → one JSON line a task
python bridge.py rollout    one of those tasks, as an agent is given it → {"reward": …, "metrics": {…}} as its last line

`verifiers/ID` is a task set of verifiers 0.4 (`verifiers.v1`), `reasoning_gym/NAME` a data set of reasoning-gym.
Nothing of ours can be imported here: standard library and the package only.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import itertools
import json
import os
import sys
import types
import urllib.request
from collections.abc import Iterator
from typing import Any

_PACKAGES = {"verifiers": "verifiers", "reasoning_gym": "reasoning-gym"}


def main() -> None:
    """Do what the first argument says; what the user can mend ends it with one line on standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print must not be among the answers
    sys.path.pop(0)  # the folder of this file: nothing of it is for the package
    given = json.loads(sys.stdin.readline())
    listing = sys.argv[1] == "prompts"
    environment = given if listing else given["metadata"]["environment"]
    package, _, name = environment["name"].partition("/")
    if package not in _PACKAGES or not name:
        sys.exit(
            f"--environment {environment['name']}: give {' or '.join(f'{each}/NAME' for each in _PACKAGES)}."
        )
    if importlib.util.find_spec(package) is None:
        sys.exit(
            f"{_PACKAGES[package]} is not installed in {sys.executable}:"
            f" {sys.executable} -m pip install {_PACKAGES[package]}"
        )
    args = environment["args"]
    if listing:
        for index, prompt in (
            _verifiers_tasks(name, args) if package == "verifiers" else _gym_tasks(name, args)
        ):
            print(json.dumps([index, prompt]), file=answers)
    else:
        play = _play_verifiers if package == "verifiers" else _play_gym
        print(json.dumps(play(name, args, environment["index"])), file=answers)


def _put_off(name: str) -> None:
    """Import a module only when something of it is asked for."""

    def load(attribute: str) -> Any:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    module = types.ModuleType(name)
    module.__getattr__ = load  # type: ignore[method-assign]
    sys.modules[name] = module


def _gym(name: str, args: dict[str, Any]) -> Any:
    # Two data sets of a hundred use it, and it brings Matplotlib: a third of each start.
    _put_off("cellpylib")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, **{"seed": 0, **args})
    except (ValueError, TypeError, AssertionError) as error:
        sys.exit(f"--environment reasoning_gym/{name}, --environment-args {json.dumps(args)}: {error}")


def _gym_tasks(name: str, args: dict[str, Any]) -> Iterator[tuple[int, str]]:
    data = _gym(name, args)
    for index in range(len(data)):
        yield index, data[index]["question"]


def _play_gym(name: str, args: dict[str, Any], index: int) -> dict[str, Any]:
    """One question, one answer: what stands in its last pair of `<answer>` tags, or all of it."""
    data = _gym(name, args)
    entry = data[index]
    said = _ask([{"role": "user", "content": entry["question"]}])
    before, tag, _ = said.rpartition("</answer>")
    answer = before.rpartition("<answer>")[2] if tag else said
    return {"reward": float(data.score_answer(answer.strip(), entry)), "metrics": {}}


def _ask(messages: list[dict[str, str]]) -> str:
    body = json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode()
    headers = {
        "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
        "Content-Type": "application/json",
    }
    url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"] or "")


def _verifiers(name: str, args: dict[str, Any]) -> Any:
    """The environment: what `args` say, with one agent, which runs on this machine."""
    import verifiers.v1 as vf

    try:
        config = {**args, "taskset": {**args.get("taskset", {}), "id": name}}
        agent = {"runtime": {"type": "subprocess"}, **config.get("agent", {})}
        if "harness" not in agent and vf.default_harness_id(name) == "bash":
            agent["harness"] = {"id": _chat_harness()}
        return vf.load_environment(vf.resolve_env_config({**config, "agent": agent}))
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        sys.exit(f"--environment verifiers/{name}, --environment-args {json.dumps(args)}: {error}")


def _chat_harness() -> str:
    """verifiers' own chat program with tools, run by this Python: its way, by uv, would install packages each time."""
    from verifiers.v1.harnesses.null import NullHarness

    class Chat(NullHarness):  # type: ignore[misc, valid-type, unused-ignore]
        async def setup(self, runtime: Any) -> None:
            async def prepare(script: str, env: Any = None, *, activate: bool = True) -> list[str]:
                path = f"{hashlib.sha256(script.encode()).hexdigest()}.py"
                await runtime.write(path, script.encode())
                return [sys.executable, path]

            runtime.prepare_uv_script = prepare

    module = types.ModuleType("slurmlime_chat")
    module.Chat, module.__all__ = Chat, ["Chat"]  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return module.__name__


def _verifiers_tasks(name: str, args: dict[str, Any]) -> Iterator[tuple[int, str]]:
    tasks = _verifiers(name, args).taskset
    if not tasks.bounded:
        sys.exit(f"--environment verifiers/{name} has an endless set of tasks: its arguments must bound it.")
    for task in tasks:
        yield task.data.idx, task.data.prompt_text or task.data.name or f"task {task.data.idx}"


def _play_verifiers(name: str, args: dict[str, Any], index: int) -> dict[str, Any]:
    import verifiers.v1 as vf

    env = _verifiers(name, args)
    task = next(itertools.islice(iter(env.taskset), index, None))
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")

    async def play() -> Any:
        async with env.serving():
            return await env.run_episode(task, vf.ModelContext(os.environ["OPENAI_MODEL"], client))

    episode = asyncio.run(play())
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        sys.exit("\n".join(f"{each.type}: {each.message}" for each in errors) or "the episode failed")
    metrics: dict[str, Any] = {}
    for trace in episode.traces:
        metrics |= trace.metrics
        metrics |= {key: each.value for key, each in trace.rewards.items() if each is not None}
    return {"reward": sum(trace.reward for trace in episode.traces), "metrics": metrics}


if __name__ == "__main__":
    main()
