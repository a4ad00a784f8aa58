"""Several runs: the frames of each, one below the other, with the run's name in front."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.frames.compare import run_row
from analysis.reading.progress import progress
from analysis.reading.samples import Columns
from analysis.reading.source import find_runs
from analysis.run import Run, load_run

_HEADLINES = ["run", "state", "steps", "num_rollout", "attempts", "gpu_hours", "reward_first", "reward_last"]


class Runs(Sequence[Run]):
    """A sequence of `Run`, and their frames together. Made by `load_runs`. `runs["name"]` is one of them."""

    def __init__(self, members: Sequence[Run]) -> None:
        self._members = list(members)
        names = Counter(run.name for run in members)
        # Runs of the same name in several directories are told apart by their paths.
        self._names = [str(run.path) if names[run.name] > 1 else run.name for run in members]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._members)

    def __getitem__(self, key: int | str) -> Run:  # type: ignore[override]
        """The run at a position, or of a name."""
        if isinstance(key, str):
            if key not in self._names:
                raise KeyError(f"no run {key!r}; there are {', '.join(self._names)}")
            return self._members[self._names.index(key)]
        return self._members[key]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a run: state, headline numbers, versions, git, W&B url, configuration as dotted columns."""
        rows = [run_row(name, run) for name, run in zip(self._names, self._members, strict=True)]
        return pd.DataFrame(rows)

    @cached_property
    def steps(self) -> pd.DataFrame:
        """`Run.steps` of all."""
        return self.each(lambda run: run.steps)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """`Run.samples` of all."""
        return self.each(lambda run: run.samples)

    @cached_property
    def groups(self) -> pd.DataFrame:
        """`Run.groups` of all."""
        return self.each(lambda run: run.groups)

    @cached_property
    def evals(self) -> pd.DataFrame:
        """`Run.evals` of all."""
        return self.each(lambda run: run.evals)

    @cached_property
    def sessions(self) -> pd.DataFrame:
        """`Run.sessions` of all."""
        return self.each(lambda run: run.sessions)

    @cached_property
    def events(self) -> pd.DataFrame:
        """`Run.events` of all."""
        return self.each(lambda run: run.events)

    @property
    def notes(self) -> pd.DataFrame:
        """`Run.notes` of all."""
        return self.each(lambda run: run.notes)

    @cached_property
    def attempts(self) -> pd.DataFrame:
        """`Run.attempts` of all."""
        return self.each(lambda run: run.attempts)

    def read_steps(self, *, long: bool = False, every_attempt: bool = False) -> pd.DataFrame:
        """`Run.read_steps` of all."""
        return self.each(lambda run: run.read_steps(long=long, every_attempt=every_attempt))

    def read_samples(
        self, columns: Columns = "scalars", steps: int | Iterable[int] | None = None
    ) -> pd.DataFrame:
        """`Run.read_samples` of all."""
        return self.each(lambda run: run.read_samples(columns, steps))

    def __repr__(self) -> str:
        return f"Runs({', '.join(self._names)})"

    def _repr_html_(self) -> str:
        shown = self.runs[[name for name in _HEADLINES if name in self.runs]]
        return f"<b>{html.escape(str(len(self)))} runs</b>" + shown.to_html(
            index=False, escape=True, na_rep="–"
        )

    def each(self, frame_of: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        """A frame of each run, one below the other, with the column `run` in front."""
        frames = [frame_of(run) for run in progress(self._members, "reading runs")]
        lengths = [len(frame) for frame in frames]
        codes = np.repeat(np.arange(len(lengths)), lengths)
        # Rows of the same dtypes concatenate without a copy into objects; empty frames would spoil the dtypes.
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        result = pd.concat(_same_categories(filled), ignore_index=True) if filled else pd.DataFrame()
        names = pd.Categorical.from_codes(codes, categories=pd.Index(self._names))
        result.insert(0, "run", pd.Series(names, index=result.index))
        return result


def load_runs(paths: str | Path | Iterable[str | Path], *, strict: bool = False) -> Runs:
    """Several runs at once.

    Args:
        paths: a pattern such as `"runs/lr-*"`, a directory of runs, or several of either.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: nothing found.
    """
    return Runs([load_run(path, strict=strict) for path in find_runs(paths)])


def _same_categories(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """The frames with categorical columns cast to the union of their categories."""
    columns = [str(name) for name in frames[0] if isinstance(frames[0][name].dtype, pd.CategoricalDtype)]
    for name in columns:
        values = list(dict.fromkeys(value for frame in frames for value in frame[name].cat.categories))
        frames = [frame.assign(**{name: frame[name].cat.set_categories(values)}) for frame in frames]
    return list(frames)
