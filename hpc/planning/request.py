"""A request of `submit`: its own options, and the training flags with the recipes merged in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc.planning.slurm_tables import SlurmTables
from rltrain.arguments.flags import Flags
from rltrain.run.layout import RunLayout

PLACEMENTS = ("het", "plain", "colocated")


@dataclass(frozen=True)
class SubmitOptions:
    """Options of `submit` itself.

    Attributes:
        partition: None to run on this machine.
        nodes: None to work it out from the training flags.
        placement: `het`, `plain` or `colocated`; None to choose.
        after: ids or names of runs whose jobs must have ended well before this one starts.
        max_restarts: how often a job is put back into the queue, whatever the reason.
        max_failures: how many attempts in a row may fail without having saved anything.
        max_engine_restarts: how often an engine that died is started again within an attempt.
        chain: number of spare jobs that take over when the one before has ended.
        recipes: that were named, by their place; the last one names the run.
        is_named: whether --name was given.
        sweep: what its runs differ in, see `hpc.submitting.sweep`.
        sweep_parallel: how many of them may have a job that runs at a time; None for all.
        share: whether the group may read the run directory; the directory's mode says so from then on.
        slurm: what the recipes' `[slurm]` tables say.
    """

    name: str
    runs_dir: Path
    partition: str | None = None
    nodes: int | None = None
    placement: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gpu_type: str | None = None
    template: Path | None = None
    after: tuple[str, ...] = ()
    max_restarts: int = 100
    max_failures: int = 1
    max_engine_restarts: int = 3
    chain: int = 0
    recipes: tuple[str, ...] = ()
    is_named: bool = False
    sweep: tuple[str, ...] = ()
    sweep_parallel: int | None = None
    share: bool = False
    detach: bool = False
    test_only: bool = False
    dry_run: bool = False
    slurm: SlurmTables = field(default_factory=SlurmTables)

    @property
    def layout(self) -> RunLayout:
        """Paths of the run."""
        return RunLayout(self.runs_dir / self.name)


# Options of one call of `submit`, which do not belong to the run.
_PASSING = (
    *("name", "is_named", "runs_dir", "after", "chain", "sweep", "sweep_parallel"),
    *("share", "detach", "test_only", "dry_run"),
)


def to_table(options: SubmitOptions) -> dict[str, Any]:
    """The options that a later submission of the same run takes over, as TOML."""
    table = {
        name: value for name, value in asdict(options).items() if name not in _PASSING and value is not None
    }
    if options.template:
        table["template"] = str(options.template)
    table["recipes"] = list(options.recipes)
    table["slurm"] = {name: value for name, value in table["slurm"].items() if value}
    return table


@dataclass(frozen=True)
class Request:
    """A whole command line: options, and training flags with the recipes merged in."""

    options: SubmitOptions
    train: Flags
