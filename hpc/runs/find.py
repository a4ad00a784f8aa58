"""Find runs, and read their files: submissions, progress, whether a run is running on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hpc.runs.lock import Holder, find_holder
from hpc.runs.log_files import disk_is_full, last_lines
from hpc.runs.progress import read_status
from rltrain.run.errors import UserError, nearest
from rltrain.run.files import newest_lines, owner_of, read_json
from rltrain.run.finished import asked_steps, claims_to_be_finished, finished_steps, is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import sound_row

LOCAL = "local"  # `layout` of a submission to this machine and not to Slurm

_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 40


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
        state: `running`, `finished` (its trainer has proven that, see `rltrain.run.finished`), `stopped` (resumable),
            `failed`, `lost` (it ended without a message: killed, or its machine died), or `submitted` (none has begun).
        reason: why the last attempt ended, if it has; of one that runs, why its checkpoints can't be saved, if so.
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
        """True if its last submission was to this machine, so that no Slurm job knows its state."""
        return not self.submissions or self.submissions[-1].layout == LOCAL


def find_runs(runs_dir: Path) -> list[RunLayout]:
    """The runs in a directory, the one that changed last at the end; without those that one may not read."""
    dated = [(_changed(path), path) for path in _entries(runs_dir) if _is_run(path)]
    return [RunLayout(path.absolute()) for _, path in sorted(dated)]


def find_private(runs_dir: Path) -> list[Path]:
    """Directories in a directory of runs that one may not look into, by name: another user's runs."""
    return sorted(path for path in _entries(runs_dir) if path.is_dir() and not _may_read(path))


def _entries(runs_dir: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(runs_dir) if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _may_read(path: Path) -> bool:
    return os.access(path, os.R_OK | os.X_OK, effective_ids=True)


def _is_run(path: Path) -> bool:
    return _may_read(path) and (path / "config.toml").is_file()


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
        if _is_run(path):
            return RunLayout(path.absolute())
        if os.path.isdir(path) and not _may_read(path):  # noqa: PTH112 – Path.is_dir raises where one may not look
            raise UserError(
                f"you may not read {path}: it belongs to {owner_of(path)}, who can share it with the group:"
                " `python -m hpc.submit --name … --share`."
            )
    known = [layout.name for layout in find_runs(runs_dir)]
    if near := nearest(str(name), known, cutoff=0.5):
        hint = f"Did you mean {near}?"
    elif known:
        hint = f"The last ones there: {', '.join(known[-5:])}."
    else:
        hint = "There are no runs there; --runs-dir says where they are."
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
    done, reward = _progress(layout)
    phase, num_rollout = status.get("phase"), asked_steps(layout)
    state = _state(layout, phase, num_rollout, holder, attempts)
    return RunRecord(
        layout=layout,
        state=state,
        reason=_reason(layout, state, holder),
        phase=phase,
        step=done,
        num_rollout=num_rollout,
        reward=reward,
        attempts=attempts,
        holder=holder,
        submissions=read_submissions(layout),
    )


def _progress(layout: RunLayout) -> tuple[int, float | None]:
    """Steps that are done, and the reward of the last one that has one."""
    done = None
    for line in newest_lines(layout.metrics, _TAIL_BYTES):
        row = sound_row(line)
        if row is None or row["step"] < 0:
            continue
        done = row["step"] + 1 if done is None else done
        if "rollout/reward" in row:
            return done, row["rollout/reward"]
    return done or 0, None


def _state(
    layout: RunLayout, phase: str | None, num_rollout: int | None, holder: Holder | None, attempts: int
) -> str:
    if holder is not None:
        return "running"
    if not attempts:
        return "submitted" if read_submissions(layout) else "not submitted"
    if is_finished(layout, 1 if num_rollout is None else num_rollout):
        return "finished"
    if phase == "finished":  # it claims to be
        return "stopped"
    return phase if phase in ("stopped", "failed") else "lost"


def _reason(layout: RunLayout, state: str, holder: Holder | None) -> str | None:
    if holder is not None:
        return _why_unsaved(layout)
    if state == "not submitted":
        return "sbatch has not accepted it; submit it again"
    if state == "lost":
        return _why_lost(layout)
    if state == "stopped" and claims_to_be_finished(layout):
        done = finished_steps(layout)
        return f"only {done} steps are known to be done and saved; `python -m hpc.resubmit` continues"
    events = newest_lines(layout.events, _TAIL_BYTES)
    end = next((event for event in events if event.get("kind") == "attempt_finished"), {})
    text = str(end.get("reason") or "").strip()
    # The first sentence; a failed role's last lines of log come after it.
    return re.split(r"\.\s|\n", text)[0].rstrip(".") if text else None


def _why_unsaved(layout: RunLayout) -> str | None:
    """Why the newest checkpoint could not be written, if so."""
    for event in newest_lines(layout.events, _TAIL_BYTES):
        if event.get("kind") in ("checkpoint_saved", "attempt_started"):
            return None
        if event.get("kind") == "checkpoint_failed":
            return f"checkpoints are not saved: {event.get('reason')}"
    return None


def _why_lost(layout: RunLayout) -> str:
    last = max(layout.attempts())
    for log in sorted(layout.log_dir(last).glob("*.log")):
        if disk_is_full(last_lines(log, _TAIL_LINES)):
            return f"the disk was full: see {log.name}"
    return "ended without a message: killed, or its machine died; `python -m hpc.resubmit` continues"


def read_submissions(layout: RunLayout) -> tuple[Submission, ...]:
    """The jobs that the run was submitted as, oldest first."""
    return tuple(_submission(entry) for entry in read_json(layout.job) or ())


def _submission(entry: dict[str, Any]) -> Submission:
    submitted = entry.get("submitted")
    return Submission(
        job_id=str(entry["job_id"]),
        components=tuple(entry.get("components") or ()),
        cluster=entry.get("cluster"),
        layout=entry.get("layout", LOCAL),
        submitted=datetime.fromisoformat(submitted).astimezone(UTC) if submitted else None,
    )
