"""Metrics for TensorBoard, with the names that they have in `metrics.jsonl`: `--use-tensorboard`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rltrain.arguments.groups.debug import Tracking
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout


class TensorBoard:
    """Writes the scalars of one attempt."""

    def __init__(self, directory: Path) -> None:
        """Go on in `directory`.

        Raises:
            UserError: the package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"--use-tensorboard: torch's writer needs a package ({error}): pip install tensorboard"
            ) from None
        self._make = SummaryWriter
        self._directory = str(directory)
        self._writer = SummaryWriter(self._directory)

    def forget_from(self, step: int) -> None:
        """From this step on, show nothing of what earlier attempts wrote: it is trained again."""
        self._writer.close()
        self._writer = self._make(self._directory, purge_step=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Write out what is still held in memory."""
        self._writer.close()


def directory_of(tracking: Tracking, layout: RunLayout) -> Path:
    """--tensorboard-dir, else `$TENSORBOARD_DIR`, else tensorboard/ of the run.

    In the latter are --tb-project-name and --tb-experiment-name, if given.
    """
    if given := tracking.tensorboard_dir or os.environ.get("TENSORBOARD_DIR"):
        return Path(given)
    names = [name for name in (tracking.tb_project_name, tracking.tb_experiment_name) if name]
    return layout.root.joinpath("tensorboard", *names)
