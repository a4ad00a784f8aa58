"""A run: frames that are read from its source when they are first asked for, and kept."""

from __future__ import annotations

import html
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis._attempts import attempts_from_events
from analysis._frames import STEP_KEYS, events_frame, long_frame, steps_frame
from analysis._groups import groups_frame
from analysis._samples import Columns, read_frame, read_training, select_files
from analysis._source import Source
from analysis._tokens import messages_frame, tokens_frame
from analysis._vocabulary import Vocabulary, find_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis._findings import Findings
    from analysis._html import Html
    from hpc.layout import RunLayout


class Run:
    """What one run has recorded. Made by `load_run` or `load_wandb`.

    Every frame is read once, when it is first used; loading again shows what a live run has written since.
    Columns and units: `analysis/README.md`.
    """

    def __init__(self, source: Source, *, strict: bool = False) -> None:
        self._source = source
        self._strict = strict

    @property
    def name(self) -> str:
        """The run's name."""
        return self._source.name

    @property
    def path(self) -> Path | str:
        """The run directory, or where else the run is."""
        return self._source.path

    @property
    def layout(self) -> RunLayout | None:
        """Where its files lie; None if it is not read from a run directory."""
        return self._source.layout

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration by section: `run.config["train"]["lr"]`. Empty before it is written."""
        return self._source.config

    @property
    def info(self) -> dict[str, Any]:
        """Identity of the run: creation time, git commit, package versions, W&B id, last status."""
        return self._source.info

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a step (-1: the evaluation before training); of several attempts the newest one's row.

        Columns are `step`, `attempt`, `time` (UTC, end of the step) and the metrics by their W&B names.
        """
        return steps_frame(self._metrics)

    def read_steps(self, *, long: bool = False, every_attempt: bool = False) -> pd.DataFrame:
        """Like `steps`.

        Args:
            long: one row a step and metric, with columns `metric` and `value`; missing values are left out.
            every_attempt: also the rows of attempts whose work was lost and done again.
        """
        frame = steps_frame(self._metrics, every_attempt=True) if every_attempt else self.steps
        return long_frame(frame, STEP_KEYS) if long else frame

    @cached_property
    def _metrics(self) -> pd.DataFrame:
        return self._source.metrics

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row an event of the job: `time` (UTC), `attempt`, `kind`, `role`, `index`, its own fields."""
        return events_frame(self._source.events)

    @cached_property
    def attempts(self) -> pd.DataFrame:
        """One row an attempt of the job, from the run's events: state, times, GPU-hours, reason of its end."""
        return attempts_from_events(self.events, self.config)

    def read_attempts(self) -> pd.DataFrame:
        """The same columns from Slurm's accounting (`sacct`): one row an attempt and component of the job.

        Raises:
            hpc.slurm.client.SlurmError: there is no accounting here.
            rltrain.arguments.errors.UserError: the run has no Slurm jobs.
        """
        from hpc.accounting import attempts

        return attempts(Path(self.path))

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a training sample, scalar columns. For texts and tokens see `read_samples`."""
        return self.read_samples()

    @cached_property
    def evals(self) -> pd.DataFrame:
        """One row an evaluation sample, scalar columns; `step` is the number of steps trained before it."""
        return self.read_evals()

    @cached_property
    def groups(self) -> pd.DataFrame:
        """One row a group of training samples; a reward of at least 1 counts as correct, see `read_groups`."""
        return self.read_groups()

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
        return read_training(self._source.layout, columns, steps, strict=self._strict)

    def read_evals(self, columns: Columns = "scalars") -> pd.DataFrame:
        """Evaluation samples, one row each; `dataset` names the set. For `columns` see `read_samples`."""
        layout = self._source.layout
        sets = [layout.sample_files(name) for name in layout.eval_datasets()] if layout else []
        files = [path for by_step in sets for paths in by_step.values() for path in paths]
        return read_frame(files, columns, strict=self._strict)

    def read_groups(self, *, threshold: float = 1.0, evals: bool = False) -> pd.DataFrame:
        """One row a group, with mean and spread of its rewards and the unbiased pass@k.

        Args:
            threshold: a sample is correct if its reward is at least this.
            evals: of the evaluation samples instead.
        """
        return groups_frame(self.evals if evals else self.samples, threshold)

    def tokens(self, sample: pd.Series | int) -> pd.DataFrame:
        """One row a token of a sample: text, id, log-probs, gap, entropy, mask, weight version.

        Args:
            sample: a row of `samples` or `evals`, or the `index` of a training sample.
        """
        return tokens_frame(self.read_sample(sample), self.vocabulary)

    def messages(self, sample: pd.Series | int) -> pd.DataFrame:
        """One row a message of the conversation: the prompt's, then what the model and its tools said."""
        return messages_frame(self.read_sample(sample), self.vocabulary)

    def read_sample(self, sample: pd.Series | int) -> pd.Series:
        """All columns of one sample.

        Raises:
            ValueError: there is no such sample.
        """
        if isinstance(sample, pd.Series):
            key = sample
        else:
            found = self.samples[self.samples["index"] == sample]
            if found.empty:
                raise ValueError(f"{self.path} has no training sample with index {sample}")
            key = found.iloc[0]
        rows = self._sample_rows(str(key["dataset"]), int(key["step"]))
        rows = rows[(rows["index"] == key["index"]) & (rows["attempt"] == key["attempt"])]
        if rows.empty:
            raise ValueError(f"step {key['step']} of {self.path} has no sample with index {key['index']}")
        return rows.iloc[0]

    def _sample_rows(self, dataset: str, step: int) -> pd.DataFrame:
        if dataset == "train" or self._source.layout is None:
            return self.read_samples("all", steps=step)
        files = select_files(self._source.layout.sample_files(dataset), step)
        return read_frame(files[step], "all", strict=self._strict)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Texts of the token ids, if the run's tokenizer.json is still where it was."""
        layout = self._source.layout
        path = (
            find_tokenizer(layout.root, self.config.get("train", {}).get("hf_checkpoint")) if layout else None
        )
        return Vocabulary.read(path) if path else None

    def doctor(self) -> Findings:
        """What looks wrong with this run, with evidence and what to do; the worst first."""
        from analysis._checks import examine

        return examine(self)

    def dashboard(self) -> Figure:
        """The most telling views on one page."""
        from analysis.plots import dashboard

        return dashboard(self)

    def show(self, sample: pd.Series | int) -> Html:
        """One sample as a page: conversation and token heat map. Shown in the notebook; `.save(path)` writes it."""
        from analysis._html import show

        return show(self, sample)

    def browse(self, *, max_samples: int = 10_000) -> Html:
        """The samples as a page to filter, sort and read. Shown in the notebook; `.save(path)` writes it."""
        from analysis._html import browse

        return browse(self, max_samples)

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
