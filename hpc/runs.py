"""Find runs, and what their files say about them: submissions, progress, whether one is running here."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hpc.feed import read_status
from hpc.layout import RunLayout
from hpc.lock import Holder, find_holder
from rltrain.arguments.errors import UserError

LOCAL = "local"  # `layout` of a submission to this machine and not to Slurm

_FINAL_PHASES = ("finished", "stopped", "failed")
_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True)
class Submission:
    """One entry of `job.json`: a job that the run was submitted as.

    Attributes:
        job_id: as sbatch printed it; of a heterogeneous job the leader's.
        components: ids of the components, `28+0`; empty for a job that has none.
        cluster: name of the Slurm cluster, None if unknown.
        layout: `het`, `plain`, `colocated` or `local`.
        submitted: None if unknown.
    """

    job_id: str
    components: tuple[str, ...] = ()
    cluster: str | None = None
    layout: str = LOCAL
    submitted: datetime | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it at one moment.

    Attributes:
        state: `running`, `finished`, `stopped` (resumable), `failed`, `lost` (it ended without a word: killed, or its
            machine died), or `submitted` (no attempt has begun).
        reason: why the last attempt ended, if it has.
        phase: what the run does, or did last.
        step: steps that are done.
        num_rollout: steps that were asked for.
        reward: of the last step that has one.
        attempts: how many have begun.
        holder: the process that runs it.
        submissions: its jobs, oldest first.
    """

    layout: RunLayout
    state: str
    reason: str | None
    phase: str | None
    step: int
    num_rollout: int | None
    reward: float | None
    attempts: int
    holder: Holder | None
    submissions: tuple[Submission, ...]

    @property
    def slurm_jobs(self) -> list[Submission]:
        """Its submissions to Slurm."""
        return [each for each in self.submissions if each.layout != LOCAL]

    @property
    def was_last_local(self) -> bool:
        """Whether its last submission was to this machine, so that no Slurm job says how it is."""
        return not self.submissions or self.submissions[-1].layout == LOCAL


def find_runs(runs_dir: Path) -> list[RunLayout]:
    """The runs in a directory, the one that changed last at the end."""
    try:
        entries = [Path(entry.path) for entry in os.scandir(runs_dir) if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    dated = [(_changed(path), path) for path in entries if (path / "config.toml").is_file()]
    return [RunLayout(path.absolute()) for _, path in sorted(dated)]


def _changed(path: Path) -> float:
    for name in ("status.json", "config.toml"):
        with suppress(OSError):
            return (path / name).stat().st_mtime
    return 0.0


def find_run(name: str | Path, runs_dir: Path = Path("runs")) -> RunLayout:
    """The run that a person means: a name below `runs_dir`, or a directory.

    Raises:
        UserError: there is none; the message has the nearest name.
    """
    for path in (runs_dir / name, Path(name)):
        if (path / "config.toml").is_file():
            return RunLayout(path.absolute())
    known = [layout.name for layout in find_runs(runs_dir)]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if near:
        hint = f"Did you mean {near[0]}?"
    elif known:
        hint = f"The last ones there: {', '.join(known[-5:])}."
    else:
        hint = "There are no runs there; --runs-dir says where they lie."
    raise UserError(f"there is no run {str(name)!r} in {runs_dir}. {hint}")


def choose_runs(names: Sequence[str | Path], runs_dir: Path) -> list[RunLayout]:
    """The runs with these names, which may be patterns such as `exp.*`, or all of them if none is given.

    Raises:
        UserError: one of them does not exist.
    """
    if not names:
        return find_runs(runs_dir)
    chosen = []
    for name in names:
        matching = [each for each in find_runs(runs_dir) if fnmatch(each.name, str(name))]
        chosen += matching if _is_pattern(name) and matching else [find_run(name, runs_dir)]
    return list(dict.fromkeys(chosen))


def _is_pattern(name: str | Path) -> bool:
    return any(sign in str(name) for sign in "*?[")


def read_run(layout: RunLayout) -> RunRecord:
    """Read a run's files; each file that is missing or half written counts as not there."""
    status = read_status(layout)
    holder = find_holder(layout)
    attempts = len(layout.attempts())
    last = _last_records(layout.metrics)
    trained = [record for record in last if record.get("step", -1) >= 0]
    rewards = [record["rollout/reward"] for record in trained if "rollout/reward" in record]
    phase = status.get("phase")
    state = _state(phase, holder, attempts)
    return RunRecord(
        layout=layout,
        state=state,
        reason=_reason(layout, state, holder),
        phase=phase,
        step=trained[-1]["step"] + 1 if trained else 0,
        num_rollout=_num_rollout(layout),
        reward=rewards[-1] if rewards else None,
        attempts=attempts,
        holder=holder,
        submissions=read_submissions(layout),
    )


def _state(phase: str | None, holder: Holder | None, attempts: int) -> str:
    if holder is not None:
        return "running"
    if not attempts:
        return "submitted"
    return phase if phase in _FINAL_PHASES else "lost"


def _reason(layout: RunLayout, state: str, holder: Holder | None) -> str | None:
    if holder is not None:
        return None
    if state == "lost":
        return "ended without a word: killed, or its machine died"
    ends = [event for event in _last_records(layout.events) if event.get("kind") == "attempt_finished"]
    text = str(ends[-1].get("reason") or "").strip() if ends else ""
    # The first sentence; a failed role's last lines of log come after it.
    return re.split(r"\.\s|\n", text)[0].rstrip(".") if text else None


def read_submissions(layout: RunLayout) -> tuple[Submission, ...]:
    """The jobs that the run was submitted as, oldest first."""
    try:
        entries = json.loads(layout.job.read_text())
    except (FileNotFoundError, ValueError):
        return ()
    return tuple(_submission(entry) for entry in entries)


def _submission(entry: dict[str, Any]) -> Submission:
    submitted = entry.get("submitted")
    return Submission(
        job_id=str(entry["job_id"]),
        components=tuple(entry.get("components") or ()),
        cluster=entry.get("cluster"),
        layout=entry.get("layout", LOCAL),
        submitted=datetime.fromisoformat(submitted).astimezone(UTC) if submitted else None,
    )


def _num_rollout(layout: RunLayout) -> int | None:
    try:
        text = layout.config.read_text()
    except OSError:
        return None
    # Not tomllib: it takes milliseconds for a whole configuration, and there may be hundreds of runs.
    table = f"\n{text}".partition("\n[train]\n")[2].partition("\n[")[0]
    match = re.search(r"^num_rollout = (\d+)$", table, re.MULTILINE)
    return int(match[1]) if match else None


def _last_records(path: Path) -> list[dict[str, Any]]:
    """The objects at the end of a file of JSON lines; a long run's file is not read from its beginning."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            lines: Iterable[bytes] = file.read().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError):  # cut off at the beginning, or still being written
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
