"""The `[slurm]` tables of a recipe: flags of sbatch and srun, lines of shell, environment.

    [slurm]
    setup = ["module load cuda/12.4"]      # lines of the batch script, before anything is started
    python = "python3"                     # of the roles, for example inside a container
    [slurm.sbatch]                         # any flag of sbatch, for the whole job
    constraint = "ib"
    [slurm.trainer]                        # the same for the nodes of one role; gpu-type is understood too
    partition = "h100"
    [slurm.rollout]
    partition = "a100"
    [slurm.srun]                           # any flag of srun, for every role
    container-image = "nvcr.io#nvidia/pytorch:25.01-py3"
    [slurm.env]
    NCCL_DEBUG = "WARN"

On a command line: `--slurm.rollout.partition a100`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rltrain.run.errors import UserError, nearest

if TYPE_CHECKING:  # the supervisor needs this module, and none of all flags
    from rltrain.arguments.flags import Flags

PREFIX = "slurm."

# A flag's value; True for a flag that takes none.
Value = str | bool

_TABLES = ("sbatch", "srun", "trainer", "rollout", "env")
_LISTS = ("setup",)
_WORDS = ("python",)
_PLANNED = {
    "nodes": "--nodes", "ntasks": "--nodes", "ntasks-per-node": "--actor-num-gpus-per-node",
    "job-name": "--name", "dependency": "--after", "array": "--sweep", "wrap": None, "output": None, "error": None,
    "signal": None, "requeue": None, "open-mode": None, "het-group": None,
}  # fmt: skip
# They change what sbatch does, or what it prints.
_NOT_FOR_SBATCH = {
    "wait": None, "parsable": None, "test-only": "--test-only", "uid": None, "gid": None, "quiet": None, "help": None,
    "usage": None, "version": None, "export-file": "[slurm.env]", "gpus": "--num-gpus-per-node",
    "gpus-per-task": "--num-gpus-per-node", "gpus-per-socket": "--num-gpus-per-node",
}  # fmt: skip
_FLAG = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SlurmTables:
    """The content of the tables; see the module's description."""

    sbatch: Mapping[str, Value] = field(default_factory=dict)
    srun: Mapping[str, Value] = field(default_factory=dict)
    trainer: Mapping[str, Value] = field(default_factory=dict)
    rollout: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    python: str | None = None

    def of_role(self, role: str) -> dict[str, Value]:
        """Flags of sbatch for the nodes of `trainer` or `rollout`: the whole job's, then its own."""
        return {**self.sbatch, **(self.trainer if role == "trainer" else self.rollout)}


def read(flags: Flags) -> SlurmTables:
    """The tables from flags such as `slurm.srun.mpi`.

    Raises:
        UserError: no such table, a name that can't be a flag, or a flag that follows from the plan.
    """
    tables: dict[str, dict[str, Value]] = {name: {} for name in _TABLES}
    setup: tuple[str, ...] = ()
    python: str | None = None
    for flag, values in flags.items():
        table, _, name = flag.removeprefix(PREFIX).partition(".")
        if table in _TABLES and name:
            _check_name(flag, table, name)
            if table not in ("env", "srun"):
                _check_sbatch(flag, name, values or ())
            if values is not None:
                tables[table][name] = ",".join(values) if values else True
        elif table in _LISTS and not name:
            setup = tuple(values or ())
        elif table in _WORDS and not name:
            python = " ".join(values or ()) or None
        else:
            raise _unknown(flag, table)
    environment = {name: "1" if value is True else str(value) for name, value in tables.pop("env").items()}
    return SlurmTables(**tables, env=environment, setup=setup, python=python)


def _check_name(flag: str, table: str, name: str) -> None:
    pattern = _VARIABLE if table == "env" else _FLAG
    if not pattern.fullmatch(name):
        raise UserError(
            f"--{flag}: {name!r} can't be the name of {'a variable' if table == 'env' else 'a flag'}."
        )
    if table != "env" and name in _PLANNED:
        instead = f" Use {_PLANNED[name]}." if _PLANNED[name] else ""
        raise UserError(f"--{flag}: {name} follows from the plan and can't be given.{instead}")


def _check_sbatch(flag: str, name: str, values: Sequence[str]) -> None:
    if name in _NOT_FOR_SBATCH:
        instead = f" Use {_NOT_FOR_SBATCH[name]}." if _NOT_FOR_SBATCH[name] else ""
        raise UserError(f"--{flag}: submit does not work with sbatch's {name}.{instead}")
    if name == "gres" and any("gpu" in value for value in values):
        raise UserError(
            f"--{flag}: the plan sets the GPUs, and Slurm would add both. Use --num-gpus-per-node and --gpu-type."
        )


def _unknown(flag: str, table: str) -> UserError:
    known = [f"{PREFIX}{name}.FLAG" for name in _TABLES] + [f"{PREFIX}{name}" for name in (*_LISTS, *_WORDS)]
    near = nearest(table, [*_TABLES, *_LISTS, *_WORDS])
    hint = f"did you mean {PREFIX}{near}?" if near else f"there are {', '.join(known)}."
    return UserError(f"unknown flag --{flag}: {hint}")
