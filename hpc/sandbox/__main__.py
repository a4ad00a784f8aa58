"""`python -m hpc.sandbox up|down|env|power-off|power-on DIR`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpc import cli
from hpc.sandbox.sandbox import Sandbox
from hpc.sandbox.spec import ClusterSpec
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        act: what the verb does.
        directory: of the sandbox.
        node: whose power is cut or restored; empty for other verbs.
        spec: of the cluster that `up` starts.
    """

    act: Callable[[Options], None]
    directory: str
    node: str
    spec: ClusterSpec


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code."""
    options = _options(vars(_parser().parse_args(argv)))
    options.act(options)
    return cli.EXIT_OK


def _options(given: dict[str, Any]) -> Options:
    """What was given.

    Raises:
        UserError: there is no such cluster.
    """
    act, directory, node = given.pop("act"), given.pop("directory"), given.pop("node", "")
    if "gpu_types" in given:
        given["gpu_types"] = tuple(given["gpu_types"].split(","))
    return Options(act, directory, node, ClusterSpec(**given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpc.sandbox",
        description="A real Slurm of several nodes on this machine, below one directory.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    default = ClusterSpec()
    up = _verb(verbs, "up", _up, "start it; returns when every node is idle")
    up.add_argument("--nodes", type=int, default=default.nodes, help="nodes with GPUs (%(default)s)")
    up.add_argument("--gpus", type=int, default=default.gpus, help="GPUs of each of them (%(default)s)")
    up.add_argument(
        "--gpu-types", default=",".join(default.gpu_types), help="divided among the nodes (%(default)s)"
    )
    up.add_argument(
        "--cpu-nodes", type=int, default=default.cpu_nodes, help="nodes without GPUs (%(default)s)"
    )
    up.add_argument("--cpus", type=int, default=default.cpus, help="CPUs that each node claims (%(default)s)")
    up.add_argument(
        "--accounting", action="store_true", help="with slurmdbd and MariaDB, so that sacct answers"
    )
    _verb(verbs, "down", _down, "stop it and everything that runs on it")
    _verb(verbs, "env", _env, 'print what to export: eval "$(python -m hpc.sandbox env DIR)"')
    for name, act, what in (
        ("power-off", _power_off, "cut a node's power"),
        ("power-on", _power_on, "restore it"),
    ):
        _verb(verbs, name, act, what).add_argument("node")
    return parser


def _verb(verbs: Any, name: str, act: Callable[[Options], None], what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=what, description=what)
    parser.add_argument("directory", metavar="DIR")
    parser.set_defaults(act=act)
    return parser


def _up(options: Options) -> None:
    begin = time.monotonic()
    Sandbox(options.directory, options.spec).up()
    print(
        f"# up in {time.monotonic() - begin:.1f} s; stop it: python -m hpc.sandbox down {options.directory}"
    )
    _env(options)


def _down(options: Options) -> None:
    Sandbox(options.directory).down()


def _env(options: Options) -> None:
    sandbox = Sandbox(options.directory)
    if not sandbox.is_up:
        raise UserError(
            f"no sandbox is up in {sandbox.directory}. Start it: python -m hpc.sandbox up {options.directory}"
        )
    for name, value in sandbox.variables.items():
        print(f"export {name}={shlex.quote(value)}")


def _power_off(options: Options) -> None:
    Sandbox(options.directory).power_off(options.node)


def _power_on(options: Options) -> None:
    Sandbox(options.directory).power_on(options.node)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
