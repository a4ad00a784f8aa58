"""What an agent's program is given, and what is kept of its output. Pure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rltrain.agents.sandbox.limits import MIB, Ended, Limits
from rltrain.arguments.groups.agents import Agents, command_words
from rltrain.run.http import host_and_port
from rltrain.sample import Sample

_MOST_TEXT = 4096  # characters that a sample keeps of each stream
_MOST_ANSWER = 1 << 16
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Outcome:
    """What became of an agent.

    Attributes:
        answer: what is graded.
        failure: why it failed, in words; "" if it did not.
        late: it was ended by its time limit.
        reward: the one that it gave itself.
        said: of its output, what the sample keeps.
    """

    answer: str = ""
    failure: str = ""
    late: bool = False
    reward: float | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    said: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """For the sample's metadata, as reward functions read it."""
        return {
            "answer": self.answer,
            "failure": self.failure,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            **(self.said or {}),
        }


def outcome_of(ended: Ended, answer: bytes | None) -> Outcome:
    """From how the program ended; `answer`: the content of --agent-answer, else it is the last line of the output."""
    lines = clean(ended.stdout).strip().splitlines()
    text = clean(answer) if answer is not None else (lines[-1] if lines else "")
    return Outcome(
        answer="" if ended.failure else text[:_MOST_ANSWER],
        failure=ended.failure,
        late=ended.reason.startswith("it took longer"),
        seconds=ended.seconds,
        exit_code=ended.code,
        said={
            "stdout": clean(ended.stdout)[-_MOST_TEXT:],
            "stderr": clean(ended.stderr)[-_MOST_TEXT:],
            "printed_bytes": ended.printed,
        },
    )


def clean(output: bytes) -> str:
    """As text that can be shown anywhere: what can't be read, and what would steer a terminal, is replaced."""
    text = output.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def standard_input(sample: Sample, model: str) -> bytes:
    """One line of JSON: prompt, metadata, and the model's name. The label stays with us."""
    metadata = {name: value for name, value in sample.metadata.items() if name != "files"}
    return (json.dumps({"prompt": sample.prompt, "metadata": metadata, "model": model}) + "\n").encode()


def words_for(agents: Agents, sample: Sample) -> list[str]:
    """The command's words, with the prompt in place of `{prompt}`."""
    prompt = sample.prompt if isinstance(sample.prompt, str) else json.dumps(sample.prompt)
    return [word.replace("{prompt}", prompt) for word in command_words(agents)]


def environment(
    agents: Agents, base_url: str, anthropic_base_url: str, key: str, model: str
) -> dict[str, str]:
    """Where the API is, by the names that OpenAI's and Anthropic's clients read."""
    return {
        "PATH": search_path(agents),
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": model,
        "ANTHROPIC_BASE_URL": anthropic_base_url,
        "ANTHROPIC_API_KEY": key,
        "ANTHROPIC_MODEL": model,
        "NO_PROXY": "*",
    }


def search_path(agents: Agents) -> str:
    """The agent's `PATH`: its Python comes first."""
    python = agents.agent_python or sys.executable
    return f"{os.path.dirname(python)}:{_SYSTEM_PATH}"  # noqa: PTH120 -- a path of the agent's


def at(url: str, address: tuple[str, int]) -> str:
    """The URL with another host and port: those at which a sandbox finds it."""
    return urlsplit(url)._replace(netloc=host_and_port(*address)).geturl()


def readable(agents: Agents) -> list[str]:
    """What the sandbox sees beside the system: the agent's Python, its files' folders, --agent-files."""
    python = Path(agents.agent_python or sys.executable)
    paths = [python.parent.parent, python.resolve().parent.parent, *map(Path, agents.agent_files)]
    paths += [
        Path(word).parent for word in command_words(agents) if word.startswith("/") and Path(word).is_file()
    ]
    return [str(path) for path in paths if path != Path("/")]


def limits_of(agents: Agents) -> Limits:
    """The limits that the flags set."""
    return Limits(agents.agent_memory * MIB, agents.agent_processes, agents.agent_disk * MIB)


def files_of(sample: Sample) -> dict[str, str]:
    """The files that the prompt's metadata puts into the home: text by path.

    Raises:
        ValueError: that is something else, or a path leads out of it.
    """
    files = sample.metadata.get("files") or {}
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise ValueError("metadata files is not a dict of texts by path")
    for path in files:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"metadata files: {path} is outside the agent's home")
    return files
