"""Whether a run is finished: the one truth, which its trainer writes.

Exit codes do not tell. srun ends with 0 when Slurm has given up on a step, and a process may be ended at any moment. So
the trainer writes a proof (`finished.json`) when all ranks have trained the last step and its checkpoint is safe.
Whatever is not proven is not finished, and runs again. Standard library only.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from rltrain.run.files import read_json, read_last_lines, replace_text
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows

EVENT = "training_finished"  # tells the supervisor, which may see the file later than it was written

_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True)
class Finish:
    """The proof.

    Attributes:
        steps: that are trained.
        attempt: the one that did the last of them.
        checkpoint: number of the checkpoint that has the last weights; None for a run that saves none.
    """

    steps: int
    attempt: int
    checkpoint: int | None = None


def write_finish(layout: RunLayout, finish: Finish) -> None:
    """Write the proof, so that it is there after a power cut, too."""
    replace_text(layout.finished, json.dumps(asdict(finish)) + "\n", durable=True)


def finished_steps(layout: RunLayout) -> int:
    """Number of steps with which the run is known to have finished; 0 if it has not.

    Versions before the proof only noted the phase, also where Slurm had given up on the trainer. There the last line of
    the metrics decides, which came after the checkpoint.
    """
    proof = read_json(layout.finished)
    if isinstance(proof, dict):
        return int(proof.get("steps", 0))
    return _steps_of_an_older_version(layout) if claims_to_be_finished(layout) else 0


def is_finished(layout: RunLayout, num_rollout: int) -> bool:
    """Whether the run has done all of `num_rollout` steps; one without steps, which only evaluates, proves that too."""
    return finished_steps(layout) >= num_rollout and (num_rollout > 0 or layout.finished.exists())


def asked_steps(layout: RunLayout) -> int | None:
    """The number of steps that the run's configuration asks for (`--num-rollout`); None if it can't be read."""
    try:
        text = layout.config.read_text(errors="replace")
    except OSError:
        return None
    # Not tomllib: it takes milliseconds for a whole configuration, and there may be hundreds of runs.
    table = f"\n{text}".partition("\n[train]\n")[2].partition("\n[")[0]
    match = re.search(r"^num_rollout = (\d+)$", table, re.MULTILINE)
    return int(match[1]) if match else None


def claims_to_be_finished(layout: RunLayout) -> bool:
    """Whether the last attempt was taken for the last one, rightly or not."""
    status: dict[str, Any] = read_json(layout.status) or {}
    return status.get("phase") == "finished"


def _steps_of_an_older_version(layout: RunLayout) -> int:
    return max(newest_rows(read_last_lines(layout.metrics, _TAIL_BYTES)), default=-1) + 1
