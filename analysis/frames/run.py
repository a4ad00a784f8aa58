"""All frames of a run: each is read from the run's source when it is first used, and kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.frames.events import attempts_from_events, events_frame, gpu_count
from analysis.frames.notes import notes_frame
from analysis.frames.samples import groups_frame, messages_frame, tokens_frame
from analysis.frames.sessions import SESSION_COLUMNS, record_of, session_tree, sessions_frame, turns_frame
from analysis.frames.steps import STEP_KEYS, eval_names, long_frame, metric, metric_rows, steps_frame, trained
from analysis.reading.errors import NotInRunError
from analysis.reading.jsonl import read_events
from analysis.reading.samples import Columns, read_evaluations, read_training
from analysis.reading.source import Source
from analysis.reading.vocabulary import Vocabulary, find_tokenizer
from rltrain.run.layout import RunLayout


class RunFrames:
    """The frames of a run. Checks, plots, pages and metrics take this; users get an `analysis.Run`, which can do more.

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
        return metric_rows(self._source.metrics)

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row an event of the job: `time` (UTC), `attempt`, `kind`, `role`, `index`, its own fields."""
        return events_frame(self._source.events)

    @cached_property
    def attempts(self) -> pd.DataFrame:
        """One row an attempt of the job, from the run's events: state, times, GPU-hours, reason of its end."""
        return attempts_from_events(self.events, self.config)

    @property
    def gpus(self) -> int:
        """GPUs of the newest attempt; before the first, the number that the configuration asks for."""
        attempts = self.attempts
        return int(attempts["gpus"].iloc[-1]) if len(attempts) else gpu_count(self.config)

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

    @cached_property
    def sessions(self) -> pd.DataFrame:
        """One row a session of an agent in training: turns, tool calls, seconds, tokens, outcome."""
        return sessions_frame(self.read_samples(SESSION_COLUMNS))

    def turns(self, session: str) -> pd.DataFrame:
        """One row a turn of a session, named by `sessions["session"]`.

        Raises:
            NotInRunError: there is no such session.
        """
        return turns_frame(self._record(session))

    def session_tree(self, session: str) -> str:
        """A session as a tree to print: forks, tools, what was sampled and in which sample it is trained.

        Raises:
            NotInRunError: there is no such session.
        """
        return session_tree(self._record(session))

    def _record(self, session: str) -> dict[str, Any]:
        found = self.sessions[self.sessions["session"] == session]
        if found.empty:
            raise NotInRunError(f"{self.path} has no session {session!r}")
        record = record_of(self.read_sample(int(found["index"].iloc[0]))["metadata"])
        assert record is not None
        return record

    def read_samples(
        self, columns: Columns = "scalars", steps: int | Iterable[int] | None = None
    ) -> pd.DataFrame:
        """Training samples, one row each, of the newest attempt of every step.

        Args:
            columns: "scalars", "text" (scalars, prompt, response, label, dict rewards, metadata), "tokens"
                (scalars, token ids, loss mask, log-probs, weight versions), "all", or a list of names.
            steps: only these; their files alone are opened.

        Raises:
            NotInRunError: an unknown column, or a step without samples.
            DamagedFileError: a file is damaged and the run was loaded with `strict=True`.
        """
        return read_training(self.layout, columns, steps, strict=self._strict)

    def read_evals(self, columns: Columns = "scalars") -> pd.DataFrame:
        """Evaluation samples, one row each; `dataset` names the set, or is NAME/SET of an evaluation made later
        (`hpc.evaluate`). For `columns` see `read_samples`."""
        return read_evaluations(self.layout, columns, strict=self._strict)

    @cached_property
    def eval_scores(self) -> dict[str, pd.Series]:
        """The mean reward of each evaluation set by the number of steps trained before it: of those that the run
        makes itself, then of NAME/SET of evaluations made later."""
        # The evaluation on the line of step k used the weights that step k + 1 generates with.
        own = {name: metric(self.steps, name) for name in eval_names(self.steps)}
        scores = {name.removeprefix("eval/"): each.set_axis(each.index + 1) for name, each in own.items()}
        names = [name for name in self.layout.eval_datasets() if "/" in name] if self.layout else []
        for name in names:
            rows = read_evaluations(self.layout, ["step", "reward"], datasets=[name], strict=self._strict)
            scores[name] = rows.groupby("step")["reward"].mean().dropna()
        return {name: each for name, each in scores.items() if len(each)}

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
        """One row per message of the conversation: first the prompt's, then the model's and its tools'."""
        return messages_frame(self.read_sample(sample), self.vocabulary)

    def read_sample(self, sample: pd.Series | int) -> pd.Series:
        """All columns of one sample.

        Raises:
            NotInRunError: there is no such sample.
        """
        if isinstance(sample, pd.Series):
            key = sample
        else:
            found = self.samples[self.samples["index"] == sample]
            if found.empty:
                raise NotInRunError(f"{self.path} has no training sample with index {sample}")
            key = found.iloc[0]
        rows = self.read_set(str(key["dataset"]), int(key["step"]))
        rows = rows[(rows["index"] == key["index"]) & (rows["attempt"] == key["attempt"])]
        if rows.empty:
            raise NotInRunError(f"step {key['step']} of {self.path} has no sample with index {key['index']}")
        return rows.iloc[0]

    def read_set(
        self,
        dataset: str,
        steps: int | Iterable[int],
        columns: Columns = "all",
        indices: Collection[int] | None = None,
    ) -> pd.DataFrame:
        """Rows of some steps of a set: `train`, or the name of an evaluation set; with `indices` only those samples.

        Raises:
            NotInRunError: an unknown column, or a step without samples.
        """
        if dataset == "train" or self.layout is None:
            return read_training(self.layout, columns, steps, indices, strict=self._strict)
        return read_evaluations(self.layout, columns, steps, [dataset], indices, strict=self._strict)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Texts of the token ids, if the run's tokenizer.json is still where it was."""
        if self.layout is None:
            return None
        path = find_tokenizer(self.layout.root, self.config.get("train", {}).get("hf_checkpoint"))
        return Vocabulary.read(path) if path else None

    @property
    def notes(self) -> pd.DataFrame:
        """One row a note that somebody made on a sample (`Run.note`), read anew each time."""
        return notes_frame(read_events(self.layout.notes, strict=self._strict) if self.layout else [])

    def headlines(self) -> dict[str, str]:
        """The run at a glance: how many steps and attempts, and the first and last value of each reward."""
        steps = trained(self.steps)
        attempts = max(len(self.attempts), steps["attempt"].nunique())
        summary = {"steps": str(len(steps)), "attempts": str(attempts)}
        rewards = [name for name in self.steps if name == "rollout/reward" or name in eval_names(self.steps)]
        for name in rewards:
            values = metric(self.steps, name)
            if len(values):
                summary[name] = f"{values.iloc[0]:.3g} → {values.iloc[-1]:.3g}"
        return summary
