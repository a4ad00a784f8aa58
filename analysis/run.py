"""A run: its frames, and what can be done with them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.frames.notes import write_note
from analysis.frames.run import RunFrames
from analysis.reading.errors import NotInRunError
from analysis.reading.source import DirectorySource, find_run
from analysis.wandb.source import open_wandb
from rltrain.run.errors import UserError
from rltrain.run.files import owner_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.checks.findings import Findings
    from analysis.pages.html import Html


class Run(RunFrames):
    """One run. Made by `load_run` or `load_wandb`.

    Every frame is read once, when it is first used; loading again shows what a live run has written since.
    Columns and units: `analysis/README.md`.
    """

    # Imported late: most notebooks use few of these, and `import analysis` stays quick.

    def read_attempts(self) -> pd.DataFrame:
        """The columns of `attempts` from Slurm's accounting (`sacct`): one row an attempt and component of the job.

        Raises:
            hpc.slurm.client.SlurmError: there is no accounting here.
            rltrain.run.errors.UserError: the run has no Slurm jobs.
        """
        from hpc.accounting import attempts

        return attempts(Path(self.path))

    def doctor(self) -> Findings:
        """What looks wrong with this run, with evidence and what to do; the worst first."""
        from analysis.checks.examine import examine

        return examine(self)

    def dashboard(self) -> Figure:
        """The most telling views on one page."""
        from analysis.plots import dashboard

        return dashboard(self)

    def note(self, sample: pd.Series | int, text: str, *, tags: Sequence[str] = ()) -> None:
        """Keep a note on a sample beside the run, in `notes.jsonl`; `notes` has them all.

        Args:
            sample: a row of `samples` or `evals`, or the `index` of a training sample.
            text: what is to be remembered.
            tags: words to find it by.

        Raises:
            NotInRunError: there is no such sample, or the run is not read from a run directory.
            UserError: the run may not be written to.
        """
        if self.layout is None:
            raise NotInRunError(f"{self.path} is not a run directory, so there is no place for notes.")
        try:
            write_note(self.layout.notes, self.read_sample(sample), text, tags)
        except PermissionError:
            raise UserError(
                f"you may not write to {self.path}: it belongs to {owner_of(Path(self.path))}."
            ) from None

    def show(self, sample: pd.Series | int) -> Html:
        """One sample as a page: conversation and token heat map. Shown in the notebook; `.save(path)` writes it."""
        from analysis.pages.html import show

        return show(self, sample)

    def browse(self, *, max_samples: int = 10_000) -> Html:
        """The samples as a page to filter, sort and read. Shown in the notebook; `.save(path)` writes it."""
        from analysis.pages.html import browse

        return browse(self, max_samples)

    def __repr__(self) -> str:
        summary = ", ".join(f"{key} {value}" for key, value in self.headlines().items())
        return f"Run({str(self.path)!r}: {summary})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for key, value in self.headlines().items()
        )
        return f"<b>{html.escape(self.name)}</b><table>{cells}</table>"


def load_run(path: str | Path, *, strict: bool = False) -> Run:
    """The run in directory `path`, finished or live. Frames are read when they are first used.

    Args:
        path: the run's directory, for example `runs/demo`.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: there is no run in `path`; the message lists the runs nearby.
    """
    return Run(DirectorySource(find_run(path), strict), strict=strict)


def load_wandb(path: str | Path, *, run_id: str | None = None, strict: bool = False) -> Run:
    """A run from W&B, with the frames of `load_run`; the samples are not in W&B, so those frames are empty.

    Args:
        path: of offline files (a `.wandb` file, a directory of one run, a `wandb` directory or its parent), which
            are read without W&B and without a network; or `entity/project/run` on the server.
        run_id: which run, if the directory holds several. The attempts of one run are put together by its id.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: nothing there, or several runs; or W&B refuses to give it out.
    """
    return Run(open_wandb(path, run_id, strict=strict), strict=strict)
