"""Where a run is read from: a run directory here, W&B in `analysis.wandb`; and how run directories are found."""

from __future__ import annotations

import glob
import json
import os
import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from analysis.reading.errors import DamagedFileWarning, RunNotFoundError, damaged
from analysis.reading.jsonl import read_events, read_metrics
from rltrain.run.errors import nearest_few
from rltrain.run.files import owner_of
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import visible

_MAX_SUGGESTIONS = 8


class Source(Protocol):
    """The recorded parts of a run."""

    @property
    def name(self) -> str:
        """The run's name."""

    @property
    def path(self) -> Path | str:
        """Where it is, for people."""

    @property
    def layout(self) -> RunLayout | None:
        """The run directory with the samples, if there is one."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration by section."""

    @property
    def info(self) -> dict[str, Any]:
        """Identity: creation time, git commit, package versions, W&B id."""

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a line of metrics in the order of writing, perhaps several of one step."""

    @property
    def events(self) -> list[dict[str, Any]]:
        """One mapping an event."""


@dataclass(frozen=True)
class DirectorySource:
    """A run directory, finished or live."""

    root: Path
    strict: bool = False

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.layout.name

    @property
    def path(self) -> Path:
        """The directory."""
        return self.root

    @property
    def layout(self) -> RunLayout:
        """The paths below it."""
        return RunLayout(self.root)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.toml`; empty before it is written."""
        try:
            return tomllib.loads(self.layout.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            damaged(self.layout.config, str(error), strict=self.strict)
            return {}

    @cached_property
    def info(self) -> dict[str, Any]:
        """`run.json`, with the content of `status.json` as `status`."""
        return {**self._object(self.layout.run_json), "status": self._object(self.layout.status)}

    @property
    def metrics(self) -> pd.DataFrame:
        """Lines of `metrics.jsonl`."""
        return read_metrics(self.layout.metrics, strict=self.strict)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Lines of `events.jsonl`."""
        return read_events(self.layout.events, strict=self.strict)

    def _object(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            damaged(path, str(error), strict=self.strict)
            return {}
        return content if isinstance(content, dict) else {}


def find_run(path: str | Path) -> Path:
    """The run directory `path`.

    Raises:
        RunNotFoundError: there is no run in `path`; the message lists the runs nearby.
    """
    path = Path(path).expanduser()
    if _is_private(path):
        raise RunNotFoundError(f"you may not read {path}: it belongs to {owner_of(path)}.")
    if not _is_run(path):
        raise RunNotFoundError(_not_found_message(path))
    return path


def find_runs(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The run directories that patterns, directories of runs, or several of either stand for; each of them once.

    Raises:
        RunNotFoundError: nothing found.
    """
    wanted = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, Path] = {}
    private: list[Path] = []
    for pattern in map(str, wanted):
        for place in map(Path, sorted(glob.glob(str(Path(pattern).expanduser())))):  # noqa: PTH207
            beside = [place] if _is_run(place) or _is_private(place) else sorted(_children(place))
            found |= {run.resolve(): run for run in beside if _is_run(run)}
            private += filter(_is_private, beside)
    if private:
        names = ", ".join(visible(str(path)) for path in private)
        warnings.warn(f"skipped (no permission to read): {names}", DamagedFileWarning, stacklevel=3)
    if not found:
        raise RunNotFoundError(_not_found_message(Path(str(wanted[0]) if wanted else "runs")))
    return list(found.values())


def _is_private(path: Path) -> bool:
    """Whether it is a directory that one may not look into."""
    return os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK, effective_ids=True)  # noqa: PTH112 – is_dir raises there


def _is_run(path: Path) -> bool:
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        return False
    layout = RunLayout(path)
    marks = [layout.run_json, layout.config, layout.metrics, layout.events, layout.rollouts]
    return any(mark.exists() for mark in marks)


def _not_found_message(path: Path) -> str:
    problem = "holds no run" if path.is_dir() else "does not exist"
    nearby = _nearby_runs(path)
    if not nearby:
        return (
            f"{path} {problem}, and there is no run beside it. A run is the directory that a job writes to."
        )
    names = [str(run) for run in nearby]
    likeliest = nearest_few(str(path), names, _MAX_SUGGESTIONS)
    listed = list(dict.fromkeys([*likeliest, *names]))
    more = f" and {len(listed) - _MAX_SUGGESTIONS} more" if len(listed) > _MAX_SUGGESTIONS else ""
    return f"{path} {problem}. Runs nearby: {', '.join(listed[:_MAX_SUGGESTIONS])}{more}."


def _nearby_runs(path: Path) -> list[Path]:
    """Runs beside and below `path`, and in `runs/` here; the newest first."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    places = [path, existing, existing / "runs", Path("runs")]
    found = {run.resolve(): run for place in places for run in _children(place) if _is_run(run)}
    return sorted(found.values(), key=lambda run: run.stat().st_mtime, reverse=True)


def _children(place: Path) -> list[Path]:
    try:
        return [child for child in place.iterdir() if child.is_dir()]
    except OSError:
        return []
