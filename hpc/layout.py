"""Where everything of a run lies: every path rule of a run directory is here and nowhere else.

A run directory is shared by the login node, the processes of the job and the notebook, so this module
imports only the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_STEP_DIR = re.compile(r"step=(\d{6,})")


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
    def lock(self) -> Path:
        """Held with flock(2) by the supervisor of the attempt that is running."""
        return self.root / ".lock"

    @property
    def status(self) -> Path:
        """What the run does now (phase, step, attempt), replaced atomically."""
        return self.root / "status.json"

    @property
    def events(self) -> Path:
        """One JSON object a line: what happened to the job."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the metrics of a step; the same names as in W&B."""
        return self.root / "metrics.jsonl"

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
    def rollouts(self) -> Path:
        """Parquet files of the samples."""
        return self.root / "rollouts"

    def step_dir(self, step: int, attempt: int) -> Path:
        """Directory of one step's samples as generated in one attempt."""
        return self.rollouts / f"step={step:06d}" / f"attempt={attempt}"

    def eval_dir(self, dataset: str, step: int, attempt: int) -> Path:
        """Directory of one evaluation's samples; `step` is the number of steps trained before it."""
        return self.rollouts / "eval" / dataset / f"step={step:06d}" / f"attempt={attempt}"

    def find_step(self, step: int) -> Path | None:
        """The newest attempt's finished directory of a step, or None."""
        attempts = (self.rollouts / f"step={step:06d}").glob("attempt=*")
        finished = [path for path in attempts if any(path.glob("*.parquet"))]
        return max(finished, key=lambda path: int(path.name.partition("=")[2]), default=None)

    def steps(self) -> list[int]:
        """Steps that have at least a directory, ascending."""
        matches = (_STEP_DIR.fullmatch(path.name) for path in self.rollouts.glob("step=*"))
        return sorted(int(match[1]) for match in matches if match)

    def log_dir(self, attempt: int) -> Path:
        """Logs of one attempt; `logs/latest` is a link to the newest."""
        return self.root / "logs" / f"attempt_{attempt}"

    @property
    def latest_logs(self) -> Path:
        """A symbolic link to the newest attempt's logs."""
        return self.root / "logs" / "latest"
