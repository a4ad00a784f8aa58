"""A run: frames that are read from its directory when they are first asked for, and kept."""

from __future__ import annotations

import difflib
import html
import tomllib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis._errors import RunNotFoundError, damaged
from analysis._frames import events_frame, steps_frame
from analysis._jsonl import read_jsonl
from analysis._samples import Columns, read_frame, select_files
from hpc.layout import RunLayout

_MAX_SUGGESTIONS = 8


class Run:
    """What one run directory holds. Made by `load_run`.

    Every frame is read once, when it is first used; `load_run` again shows what a live run has written
    since. Columns and units: `analysis/README.md`.
    """

    def __init__(self, path: Path, *, strict: bool = False) -> None:
        self.path = path
        self._layout = RunLayout(path)
        self._strict = strict

    @property
    def name(self) -> str:
        """The run's name: its directory's name."""
        return self._layout.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration by section: `run.config["train"]["lr"]`. Empty before it is written."""
        try:
            return tomllib.loads(self._layout.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except tomllib.TOMLDecodeError as error:
            damaged(self._layout.config, str(error), strict=self._strict)
            return {}

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a step (-1: the evaluation before training); of several attempts the newest one's row.

        Columns are `step`, `attempt`, `time` (UTC, end of the step) and the metrics by their W&B names.
        """
        return steps_frame(read_jsonl(self._layout.metrics, strict=self._strict))

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row an event of the job: `time` (UTC), `attempt`, `kind`, `role`, `index`, its own fields."""
        return events_frame(read_jsonl(self._layout.events, strict=self._strict))

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a training sample, scalar columns. For texts and tokens see `read_samples`."""
        return self.read_samples()

    @cached_property
    def evals(self) -> pd.DataFrame:
        """One row an evaluation sample, scalar columns; `step` is the number of steps trained before it."""
        return self.read_evals()

    def read_samples(
        self, columns: Columns = "scalars", steps: int | Iterable[int] | None = None
    ) -> pd.DataFrame:
        """Training samples, one row each, of the newest attempt of every step.

        Args:
            columns: "scalars", "text" (scalars, prompt, response, label, dict rewards, metadata), "tokens"
                (scalars, token ids, loss mask, log-probs, weight versions), "all", or a list of names.
            steps: only these; their files alone are opened.

        Raises:
            ValueError: an unknown column, or a step without samples.
            DamagedFileError: a file is damaged and the run was loaded with `strict=True`.
        """
        return read_frame(select_files(self._layout.sample_files(), steps), columns, strict=self._strict)

    def read_evals(self, columns: Columns = "scalars") -> pd.DataFrame:
        """Evaluation samples, one row each; `dataset` names the set. For `columns` see `read_samples`."""
        sets = [self._layout.sample_files(name) for name in self._layout.eval_datasets()]
        files = [path for files in sets for path in select_files(files, None)]
        return read_frame(files, columns, strict=self._strict)

    def __repr__(self) -> str:
        summary = ", ".join(f"{key} {value}" for key, value in self._summary().items())
        return f"Run({str(self.path)!r}: {summary})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in self._summary().items()
        )
        return f"<b>{html.escape(self.name)}</b><table>{cells}</table>"

    def _summary(self) -> dict[str, str]:
        trained = self.steps[self.steps["step"] >= 0]
        summary = {"steps": str(len(trained)), "attempts": str(trained["attempt"].nunique())}
        for name in self.steps.columns:
            is_headline = name == "rollout/reward" or (name.startswith("eval/") and name.count("/") == 1)
            values = self.steps[name].dropna()
            if is_headline and len(values):
                summary[name] = f"{values.iloc[0]:.3g} → {values.iloc[-1]:.3g}"
        return summary


def load_run(path: str | Path, *, strict: bool = False) -> Run:
    """The run in directory `path`, finished or live. Nothing large is read before it is asked for.

    Args:
        path: the run's directory, for example `runs/demo`.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: there is no run in `path`; the message lists the runs nearby.
    """
    path = Path(path).expanduser()
    if not _is_run(path):
        raise RunNotFoundError(_not_found_message(path))
    return Run(path, strict=strict)


def _is_run(path: Path) -> bool:
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
    nearest = difflib.get_close_matches(str(path), names, n=_MAX_SUGGESTIONS, cutoff=0.6)
    listed = list(dict.fromkeys([*nearest, *names]))
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
