"""Where everything of a run lies: every path rule of a run directory is here and nowhere else.

A run directory is shared by the login node, the processes of the job and the notebook, so this module
imports only the standard library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_STEP_DIR = re.compile(r"step=(\d{6,})")
_ATTEMPT_DIR = re.compile(r"attempt=(\d+)")
_EVALUATION_DIR = re.compile(r"(.+)-step-\d+")
_ATTEMPT_LOGS = re.compile(r"attempt_(\d+)")


@dataclass(frozen=True)
class RunLayout:
    """The paths below one run directory."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name: its directory's name."""
        return self.root.name

    @property
    def run_json(self) -> Path:
        """Identity of the run: name, W&B id, creation time, git commit, package versions."""
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        """The resolved configuration, as TOML."""
        return self.root / "config.toml"

    @property
    def job(self) -> Path:
        """The jobs that the run was submitted as: a JSON list, one entry a submission, oldest first."""
        return self.root / "job.json"

    @property
    def script(self) -> Path:
        """The batch script that was submitted last, exactly."""
        return self.root / "job.sbatch"

    @property
    def lock(self) -> Path:
        """Held with flock(2) by the supervisor of the attempt that is running."""
        return self.root / ".lock"

    @property
    def status(self) -> Path:
        """What the run does now (phase, step, attempt), replaced atomically."""
        return self.root / "status.json"

    @property
    def finished(self) -> Path:
        """The trainer's proof that the run is finished. See `rltrain.run.finished`."""
        return self.root / "finished.json"

    @property
    def standard_config(self) -> Path:
        """The model's `config.json` as transformers reads it. See `rltrain.models.as_transformers`."""
        return self.root / "config_of_transformers.json"

    @property
    def events(self) -> Path:
        """One JSON object a line: what happened to the job."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the metrics of a step; the same names as in W&B."""
        return self.root / "metrics.jsonl"

    @property
    def notes(self) -> Path:
        """One JSON object a line: what people noted on samples."""
        return self.root / "notes.jsonl"

    @property
    def kept_metrics(self) -> Path:
        """The metrics of the step that was saved last: its line of `metrics.jsonl`, if it got none."""
        return self.root / "metrics_of_checkpoint.json"

    @property
    def submitit(self) -> Path:
        """submitit's own files (pickles, its logs)."""
        return self.root / "submitit"

    @property
    def wandb(self) -> Path:
        """Parent of W&B's own `wandb/` directory."""
        return self.root

    @property
    def checkpoints(self) -> Path:
        """Default of `--save`: one `iter_NNNNNNN` directory a checkpoint."""
        return self.root / "checkpoints"

    @property
    def rollout_state(self) -> Path:
        """States of the data source, one file a step."""
        return self.checkpoints / "rollout_state"

    @property
    def weights(self) -> Path:
        """Weights on their way to the engines (transport `disk`)."""
        return self.root / "weights"

    @property
    def profile(self) -> Path:
        """Traces of the trainer, and histories of its memory, where they were asked for."""
        return self.root / "profile"

    @property
    def plots(self) -> Path:
        """Pictures made from the run."""
        return self.root / "plots"

    @property
    def rollouts(self) -> Path:
        """Parquet files of the samples."""
        return self.root / "rollouts"

    def step_dir(self, step: int, attempt: int) -> Path:
        """Directory of one step's samples as generated in one attempt."""
        return self.rollouts / f"step={step:06d}" / f"attempt={attempt}"

    def eval_dir(self, dataset: str, step: int, attempt: int) -> Path:
        """Directory of one evaluation's samples; `step` is the number of steps trained before it."""
        return self.rollouts / "eval" / dataset / f"step={step:06d}" / f"attempt={attempt}"

    @property
    def evaluations(self) -> Path:
        """Evaluations of its checkpoints that were made later (`hpc.evaluate`), each a run directory."""
        return self.root / "evaluations"

    def evaluation(self, name: str, step: int) -> RunLayout:
        """The evaluation `name` of the checkpoint of `step`."""
        return RunLayout(self.evaluations / f"{name}-step-{step}")

    def later_evaluations(self, name: str | None = None) -> list[tuple[str, RunLayout]]:
        """Name and paths of each evaluation in `evaluations`, of one name or of all, sorted."""
        matches = ((_EVALUATION_DIR.fullmatch(each), each) for each in sorted(_names(self.evaluations)))
        found = [(match[1], RunLayout(self.evaluations / each)) for match, each in matches if match]
        return [each for each in found if name in (None, each[0])]

    def trainer_dir(self, step: int, attempt: int) -> Path:
        """Directory of the trainer's values for one step's tokens in one attempt: `part-0.parquet`."""
        return self.root / "rollouts_trainer" / f"step={step:06d}" / f"attempt={attempt}"

    def find_step(self, step: int) -> Path | None:
        """The newest attempt's finished directory of a step, or None."""
        files = _newest_attempt(self.rollouts / f"step={step:06d}")
        return files[0].parent if files else None

    def steps(self) -> list[int]:
        """Steps that have at least a directory, ascending."""
        return sorted(_step_dirs(self.rollouts))

    def sample_files(
        self, dataset: str | None = None, steps: Collection[int] | None = None
    ) -> dict[int, list[Path]]:
        """Finished Parquet files by step, ascending, of each step's newest attempt.

        Of the training samples, or of the evaluation set `dataset`: one of `eval_datasets`. With `steps` only the
        directories of those are looked into.
        """
        name, slash, later = (dataset or "").partition("/")
        if slash:
            parts = [each.sample_files(later, steps) for _, each in self.later_evaluations(name)]
            return dict(sorted((step, files) for part in parts for step, files in part.items()))
        base = self.rollouts if dataset is None else self.rollouts / "eval" / dataset
        return _newest_files(base, steps)

    def trainer_files(self, steps: Collection[int] | None = None) -> dict[int, list[Path]]:
        """Finished Parquet files of `trainer_dir` by step, ascending, of each step's newest attempt."""
        return _newest_files(self.root / "rollouts_trainer", steps)

    def eval_datasets(self) -> list[str]:
        """Names of the evaluation sets that have samples, sorted; then NAME/SET of `later_evaluations`."""
        own = sorted(path.name for path in (self.rollouts / "eval").glob("*") if path.is_dir())
        later = [(name, each.eval_datasets()) for name, each in self.later_evaluations()]
        return own + sorted({f"{name}/{dataset}" for name, datasets in later for dataset in datasets})

    def log_dir(self, attempt: int) -> Path:
        """Logs of one attempt; `logs/latest` is a link to the newest."""
        return self.root / "logs" / f"attempt_{attempt}"

    def attempts(self) -> list[int]:
        """Numbers of the attempts that have been started, ascending."""
        matches = (_ATTEMPT_LOGS.fullmatch(path.name) for path in (self.root / "logs").glob("attempt_*"))
        return sorted(int(match[1]) for match in matches if match)

    @property
    def latest_logs(self) -> Path:
        """A symbolic link to the newest attempt's logs."""
        return self.root / "logs" / "latest"


def _step_dirs(base: Path) -> dict[int, Path]:
    matches = ((_STEP_DIR.fullmatch(path.name), path) for path in base.glob("step=*"))
    return {int(match[1]): path for match, path in matches if match}


def _newest_files(base: Path, steps: Collection[int] | None) -> dict[int, list[Path]]:
    dirs = _step_dirs(base) if steps is None else {step: base / f"step={step:06d}" for step in steps}
    newest = ((step, _newest_attempt(path)) for step, path in sorted(dirs.items()))
    return {step: files for step, files in newest if files}


def _newest_attempt(step_dir: Path) -> list[Path]:
    """Finished files of the newest attempt that has any."""
    matches = (_ATTEMPT_DIR.fullmatch(name) for name in _names(step_dir))
    for attempt in sorted((int(match[1]) for match in matches if match), reverse=True):
        directory = step_dir / f"attempt={attempt}"
        # Files beginning with a dot are still being written.
        names = sorted(name for name in _names(directory) if name.endswith(".parquet") and name[0] != ".")
        if names:
            return [directory / name for name in names]
    return []


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 – several times as fast for ten thousand steps
    except (FileNotFoundError, NotADirectoryError):
        return []
