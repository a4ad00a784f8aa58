"""The tasks of an environment as a prompt file, written once, before the first job; and the reward that it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rltrain.agents.program import Outcome
from rltrain.arguments.config import Config
from rltrain.arguments.groups.agents import BRIDGE
from rltrain.data.prompt_file import split_slice
from rltrain.run.errors import UserError
from rltrain.run.files import replace_text

_SECONDS = 3600  # a data set may have to be downloaded


def prepare(config: Config) -> None:
    """Write --prompt-data, and the files of the evaluation sets that an environment plays, where they aren't there.

    Raises:
        UserError: an environment can't be loaded in --agent-python, has no tasks, or a file is of another one.
    """
    agents, data = config.agents, config.data
    assert agents.environment and data.prompt_data
    python = agents.agent_python or sys.executable
    trained = {"name": agents.environment, "args": agents.environment_args}
    _prepare(python, trained, data.prompt_data, (data.input_key, data.metadata_key), "--prompt-data")
    for each in config.evaluation.eval_datasets:
        if "environment" not in each:
            continue
        where = f"evaluation set {each['name']}:"
        asked = {"name": each["environment"], "args": each["environment_args"]}
        if asked == trained and not split_slice(each["path"])[0].exists():
            raise UserError(
                f"{where} it would use the training tasks. Give it others with --eval-environment-args, for example"
                f" another seed; or name the file of --prompt-data, with a part of it: {data.prompt_data}@[0:100]."
            )
        _prepare(python, asked, each["path"], (each["input_key"], each["metadata_key"]), where)


def _prepare(python: str, asked: dict[str, Any], file: str, keys: tuple[str, str], where: str) -> None:
    path, _ = split_slice(file)
    input_key, metadata_key = keys
    if path.exists():
        _check(path, asked, metadata_key, where)
        return
    lines = []
    for index, prompt in _tasks(python, asked):
        metadata = {"environment": {**asked, "index": index}}
        lines.append(json.dumps({input_key: prompt, metadata_key: metadata}) + "\n")
    if not lines:
        raise UserError(f"--environment {asked['name']} has no tasks.")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))


def _tasks(python: str, asked: dict[str, Any]) -> list[tuple[int, str]]:
    try:
        done = subprocess.run(
            [python, BRIDGE, "prompts"], input=json.dumps(asked) + "\n", capture_output=True, text=True,
            timeout=_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--environment {asked['name']}: {python}: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{python} ended with {done.returncode}"]
        # What the user can mend is one line; of a traceback the last one says most.
        raise UserError(said[-1] if said[0].startswith("Traceback") else "\n".join(said))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def _check(path: Path, asked: dict[str, Any], key: str, where: str) -> None:
    """The file must be of this environment: a rollout plays what its line says."""
    with path.open() as file:
        line = file.readline()
    try:
        found = json.loads(line)[key]["environment"]
        same = {name: found[name] for name in asked} == asked
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(
            f"{where} {path} was not written for --environment {asked['name']} with the arguments"
            f" {json.dumps(asked['args'])}. Name a file that does not exist: it will be written."
        )


def with_reward(outcome: Outcome) -> Outcome:
    """The environment's reward; 0 if it failed, with the reason."""
    if outcome.failure:
        return replace(outcome, reward=0.0)
    try:
        said = json.loads(outcome.answer)
        reward = float(said["reward"])
        metrics = dict(said["metrics"])
        if not math.isfinite(reward):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return replace(outcome, reward=0.0, failure=f"the environment gave no reward: {outcome.answer:.200}")
    return replace(outcome, reward=reward, said={**(outcome.said or {}), "metrics": metrics})
