"""A run as W&B recorded it: from its offline files without W&B, or from its server through W&B's public API."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.reading.errors import RunNotFoundError, damaged
from analysis.reading.jsonl import rows_frame
from rltrain.wandb_file import CONFIG, HISTORY, RUN, read_history, read_records, record_kind, run_fields


@dataclass(frozen=True)
class WandbSource:
    """The record that W&B has of one run; it holds neither samples nor events."""

    name: str
    path: Path | str
    config: dict[str, Any]
    info: dict[str, Any]
    metrics: pd.DataFrame
    layout: None = None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """None."""
        return []


def open_wandb(path: str | Path, run_id: str | None, *, strict: bool) -> WandbSource:
    """A run from offline files, or if there are none at `path`, from the server. See `analysis.load_wandb`.

    Raises:
        RunNotFoundError: nothing there, or several runs; or W&B refuses to give it out.
        DamagedFileError: a file is damaged, if `strict`.
    """
    place = Path(path).expanduser()
    if place.exists():
        return _offline(place, run_id, strict)
    if str(path).count("/") != 2 or str(path).startswith(("/", ".")):
        raise RunNotFoundError(
            f"{path} does not exist, and does not read entity/project/run as W&B names its runs."
        )
    return _online(str(path))


@dataclass(frozen=True)
class _File:
    path: Path
    identity: dict[str, Any]
    config: dict[str, Any]
    history: dict[str, list[Any]]


def _offline(place: Path, run_id: str | None, strict: bool) -> WandbSource:
    paths = _wandb_files(place)
    if run_id:
        paths = [path for path in paths if path.stem.removeprefix("run-") == run_id]
    ids = sorted({path.stem.removeprefix("run-") for path in paths})
    if not ids:
        raise RunNotFoundError(f"{place} holds no W&B file{f' of run {run_id}' if run_id else ''}.")
    if len(ids) > 1:
        raise RunNotFoundError(f"{place} holds several runs: choose one with run_id= {', '.join(ids)}.")
    files = [_read_file(path, strict) for path in paths]
    frames = [_rows(file.history, attempt) for attempt, file in enumerate(files)]
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    identity: dict[str, Any] = {"id": ids[0]}
    config: dict[str, Any] = {}
    for file in files:
        identity |= file.identity
        config |= file.config
    info = {
        "wandb_run_id": identity["id"],
        "project": identity.get("project"),
        "entity": identity.get("entity"),
    }
    metrics = pd.concat(filled, ignore_index=True)
    return WandbSource(identity.get("name") or ids[0], place, _sections(config), info, metrics)


def _wandb_files(place: Path) -> list[Path]:
    """Files by the time in their directories' names, which is the order of the attempts."""
    if place.is_file():
        return [place]
    patterns = ["run-*.wandb", "*run-*/run-*.wandb", "wandb/*run-*/run-*.wandb"]
    # latest-run is a link to one of the others.
    found = [path for pattern in patterns for path in place.glob(pattern) if path.parent.name != "latest-run"]
    return sorted(
        found, key=lambda path: path.parent.name.rpartition("run-")[0] + path.parent.name.split("run-", 1)[-1]
    )


def _read_file(path: Path, strict: bool) -> _File:
    records = read_records(path, lambda reason: damaged(path, reason, strict=strict))
    by_kind: dict[int, list[bytes]] = {}
    for record in records:
        by_kind.setdefault(record_kind(record), []).append(record)
    identity, config = run_fields([*by_kind.get(RUN, []), *by_kind.get(CONFIG, [])])
    return _File(path, identity, config, read_history(by_kind.get(HISTORY, [])))


def _rows(history: dict[str, Any] | pd.DataFrame, attempt: int) -> pd.DataFrame:
    """One row a step: `step` is the run's own axis if it has one, else W&B's; rows of one step are put together."""
    frame = pd.DataFrame(history)
    steps = frame["step"] if "step" in frame else frame.get("_step", pd.Series(dtype="int64"))
    frame = frame.assign(step=steps, attempt=attempt, time=frame.get("_timestamp"))
    frame = frame[frame["step"].notna()].drop(columns=["_step", "_timestamp", "_runtime"], errors="ignore")
    if frame["step"].duplicated().any():
        frame = frame.groupby("step", as_index=False, sort=False).last()
    return frame.astype({"step": "int64"})


def _online(path: str) -> WandbSource:
    import wandb

    try:
        run = wandb.Api().run(path)
        # Without keys: with them, W&B leaves out every row that lacks one.
        history: list[dict[str, Any]] = list(run.scan_history())
    except wandb.errors.Error as error:
        raise RunNotFoundError(f"W&B does not give out {path}: {error}") from error
    info = {"wandb_run_id": run.id, "url": run.url, "state": run.state, "created": run.created_at}
    config = {key: value for key, value in dict(run.config).items() if not key.startswith("_")}
    return WandbSource(run.name or path, path, _sections(config), info, _rows(rows_frame(history), 0))


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    """W&B holds what is the section `train` of a run directory's configuration."""
    return config if isinstance(config.get("train"), dict) else {"train": config}
