"""Agents: programs that speak the OpenAI or Anthropic API, as rollouts."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rltrain.arguments.declare import Owner, declared, flag
from rltrain.arguments.groups.data import absolute
from rltrain.arguments.groups.functions import Functions
from rltrain.run.errors import UserError

RUN_COMMAND = "rltrain.agents.rollout.run_command"
RUN_FUNCTION = "rltrain.agents.rollout.run_function"
BRIDGE = str(Path(__file__).parents[2] / "agents/environments/bridge.py")


@dataclass(frozen=True)
class Agents:
    """Agents.

    With --agent-command or --agent-function-path each sample is a session of an agent; docs/agents.md.
    """

    owner: ClassVar[Owner] = "slurmlime"

    agent_gateway: bool = flag(
        "serve the OpenAI and Anthropic APIs to programs that a generation function starts; docs/agents.md",
        False,
    )
    agent_command: str | None = flag(
        "program to run for each sample: JSON on its standard input, the API's URL and key in its environment",
        metavar="COMMAND",
    )
    environment: str | None = flag(
        "environment that is prompts, agent and reward: verifiers/ID or reasoning_gym/NAME; docs/agents.md",
        metavar="NAME",
    )
    environment_args: dict[str, Any] = flag("its arguments", {}, metavar="JSON")
    eval_environment_args: dict[str, Any] | None = flag(
        "its arguments for the tasks of evaluation sets (default: --environment-args)", metavar="JSON"
    )
    agent_python: str | None = flag(
        "the agent's own Python, which comes first in its PATH (default: the run's)", metavar="FILE"
    )
    agent_files: list[str] = flag(
        "paths that the sandbox sees, read-only, beside the system and the folders of the command's files",
        [],
        metavar="PATH",
    )
    agent_answer: str | None = flag(
        "file in its home that holds the final answer (default: its last line of output)",
        metavar="FILE",
    )
    agent_sandbox: Literal["bubblewrap", "apptainer", "pyxis", "none"] = flag(
        "the agent's sandbox; none: plain processes, for trusted code (default: bubblewrap)", "bubblewrap"
    )
    agent_image: str | None = flag("image of Apptainer or pyxis", metavar="IMAGE")
    agent_timeout: int = flag("seconds that a session may take (default: 600)", 600, metavar="S", at_least=1)
    agent_max_turns: int | None = flag("maximum number of responses in a session", metavar="N", at_least=1)
    agent_max_tokens: int | None = flag(
        "maximum number of tokens sampled in a session", metavar="N", at_least=1
    )
    agent_concurrency: int | None = flag(
        "sessions at a time (default: as many as samples are generated at a time)", metavar="N", at_least=1
    )
    agent_retries: int = flag(
        "retries when the sandbox or the engines fail, not the agent (default: 2)",
        2,
        metavar="N",
        at_least=0,
    )
    agent_memory: int = flag("memory of a sandbox in MB (default: 2048)", 2048, metavar="MB", at_least=16)
    agent_disk: int = flag(
        "size of a sandbox's home, and of its /tmp, in MB each (default: 512)", 512, metavar="MB", at_least=1
    )
    agent_processes: int = flag(
        "processes and threads of a sandbox (default: 128)", 128, metavar="N", at_least=1
    )


_OF_COMMANDS = (
    "agent_python", "agent_files", "agent_answer", "agent_sandbox", "agent_image", "agent_memory", "agent_disk",
    "agent_processes",
)  # fmt: skip


def resolve_agents(agents: Agents, functions: Functions) -> tuple[Agents, Functions]:
    """What runs the agent becomes the generation function, and the gateway is served.

    Raises:
        UserError: flags that contradict each other, or would do nothing.
    """
    if agents.environment:
        agents = _with_environment(agents, functions)
    given = {
        each.name: each.option for each in declared(Agents) if getattr(agents, each.name) != each.default
    }
    ways = {
        "--agent-command": agents.agent_command,
        "--agent-function-path": functions.agent_function_path,
        "--custom-generate-function-path": functions.custom_generate_function_path,
    }
    ours = functions.custom_generate_function_path in (RUN_COMMAND, RUN_FUNCTION)  # it was resolved before
    asked = [flag for flag, value in ways.items() if value and not (ours and flag.startswith("--custom"))]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: each fills the samples. Give one of them.")
    runs_agents = bool(agents.agent_command or functions.agent_function_path)
    for name, option in given.items():
        if name in ("environment_args", "eval_environment_args") and not agents.environment:
            raise UserError(f"{option} needs --environment.")
        if name in _OF_COMMANDS and not agents.agent_command:
            raise UserError(f"{option} says how a program is run: add --agent-command, or leave it out.")
        if name not in (*_OF_COMMANDS, "agent_gateway") and not runs_agents:
            raise UserError(f"{option} needs --agent-command or --agent-function-path: no agent is run.")
    if not runs_agents:
        return agents, functions
    needs_image = agents.agent_sandbox in ("apptainer", "pyxis")
    if agents.agent_command and needs_image != bool(agents.agent_image):
        missing = (
            "needs --agent-image" if needs_image else "takes no --agent-image: only apptainer and pyxis do"
        )
        raise UserError(f"--agent-sandbox {agents.agent_sandbox} {missing}.")
    way = RUN_COMMAND if agents.agent_command else RUN_FUNCTION
    resolved = replace(
        agents,
        agent_gateway=True,
        agent_python=agents.agent_python and absolute(agents.agent_python),
        agent_files=[absolute(path) for path in agents.agent_files],
        agent_command=agents.agent_command and _with_absolute_files(agents.agent_command),
    )
    return resolved, replace(functions, custom_generate_function_path=way)


def _with_environment(agents: Agents, functions: Functions) -> Agents:
    """The program that plays the environment is the agent."""
    python = agents.agent_python and absolute(agents.agent_python)
    command = shlex.join([python or "python", BRIDGE, "rollout"])
    for option, value in (
        ("--agent-command", agents.agent_command if agents.agent_command != command else None),
        ("--agent-answer", agents.agent_answer),
        ("--custom-rm-path", functions.custom_rm_path),
    ):
        if value:
            raise UserError(f"--environment has its own agent, answer and reward: leave {option} out.")
    return replace(agents, agent_command=command)


def command_words(agents: Agents) -> list[str]:
    """The words of --agent-command."""
    return shlex.split(agents.agent_command or "")


def _with_absolute_files(command: str) -> str:
    """The command with the files that it names below this directory by their full path: agents run in their home."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--agent-command {command}: {error}.") from None
    if not words:
        raise UserError("--agent-command is empty.")
    return shlex.join(absolute(word) if Path(word).is_file() else word for word in words)
