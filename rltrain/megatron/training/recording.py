"""What the trainer saw of a step's tokens, in Parquet files.

Beside the samples of a run: log-probs, entropies and advantages. They come from the training pass itself, are gathered
on rank 0, and are written by a thread. With --save-debug-train-data: every input of the loss, a file a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.data.batch import Flat, joined
from rltrain.megatron.ranks import control_group
from rltrain.megatron.training.micro_batch import LossInputs, MicroBatch
from rltrain.megatron.training.share import RankShare
from rltrain.run.files import replacing
from rltrain.run.role import RoleContext
from rltrain.schema import TRAINER_SCHEMA

COLUMNS = ("trainer_log_probs", "trainer_entropies", "advantages")


class SeenTokens:
    """Log-probs and entropies of the training passes of one rollout, as they come."""

    def __init__(self) -> None:
        self._seen: list[tuple[MicroBatch, Tensor, Tensor]] = []

    def note(self, micro_batch: MicroBatch, log_probs: Tensor, entropy: Tensor) -> None:
        """Keep those of a micro-batch's n trainable tokens."""
        self._seen.append((micro_batch, log_probs.detach(), entropy.detach()))

    def collect(self, share: RankShare) -> dict[str, Flat]:
        """Of this rank's samples, on the CPU."""
        micro_batches = [each for each, _, _ in self._seen]
        return {
            "trainer_log_probs": share.scatter(micro_batches, [each for _, each, _ in self._seen]),
            "trainer_entropies": share.scatter(micro_batches, [each for _, _, each in self._seen]),
        }


def token_columns(algorithm: Algorithm, seen: dict[str, Flat], inputs: LossInputs[Flat]) -> dict[str, Flat]:
    """What is written of a rollout.

    Args:
        seen: Of the training passes. The later optimizer steps see weights that the earlier ones have changed, so
            the policy's log-probs from before the first one are better, where they were computed.
        inputs: Of the loss.
    """
    columns = dict(seen)
    if inputs.old_log_probs is not None and not (algorithm.use_rollout_logprobs or algorithm.keep_old_actor):
        columns["trainer_log_probs"] = inputs.old_log_probs
    if inputs.advantages is not None:
        columns["advantages"] = inputs.advantages
    return columns


@dataclass(frozen=True)
class TokenRows:
    """Some samples' values, for the columns that there are: [trainable tokens], one sample's after the other's."""

    samples: list[int]
    columns: dict[str, NDArray[np.float32]]


def gather(share: RankShare, values: dict[str, Flat]) -> list[TokenRows] | None:
    """The values of all data parallel ranks, on rank 0; None on the others. All ranks call it."""
    rows = None
    if _speaks_for_its_samples():
        columns = {
            name: joined([flat[i] for i in share.samples], np.float32) for name, flat in values.items()
        }
        rows = TokenRows(share.samples, columns)
    gathered: list[TokenRows | None] = [None] * dist.get_world_size()
    dist.gather_object(rows, gathered if dist.get_rank() == 0 else None, group=control_group())
    return [each for each in gathered if each is not None] if dist.get_rank() == 0 else None


def to_table(share: RankShare, rows: list[TokenRows], *, step: int, attempt: int) -> pa.Table:
    """One row a sample of the rollout; NaN for response tokens and null for samples that are not trained on."""
    masks, count = share.trainable.masks, len(share.batch)
    samples = [i for part in rows for i in part.samples]
    place = {sample: at for at, sample in enumerate(samples)}
    columns = {}
    for name in COLUMNS:
        parts = [part.columns[name] for part in rows if name in part.columns]
        if not parts:
            columns[name] = pa.nulls(count, pa.list_(pa.float32()))
            continue
        mask = joined([masks[i] for i in samples], np.bool_)
        full = np.full(len(mask), np.nan, np.float32)
        full[mask] = joined(parts, np.float32)
        ends = np.cumsum([0, *(len(masks[i]) for i in samples)], dtype=np.int32)
        lists = pa.ListArray.from_arrays(ends, full)
        columns[name] = lists.take(pa.array([place.get(i) for i in range(count)], pa.int64()))
    indices = np.arange(count) if share.batch.indices is None else share.batch.indices
    fixed = {"step": [step] * count, "attempt": [attempt] * count, "index": indices}
    return pa.table({**fixed, **columns}, schema=TRAINER_SCHEMA)


class TokenWriter:
    """Writes on rank 0, one file at a time; what goes wrong is said and does not stop the training."""

    def __init__(self, context: RoleContext, complain: Callable[[str], object]) -> None:
        """`complain` is told, in words, that a file could not be written."""
        self._context, self._complain = context, complain
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer-tokens")
        self._last: Future[None] | None = None

    def write(self, rollout_id: int, share: RankShare, columns: dict[str, Flat]) -> None:
        """Gather a rollout's values, by column, and begin to write them. All ranks call it."""
        rows = gather(share, columns)
        if rows is not None:
            self.wait()
            attempt = self._context.attempt
            directory = self._context.layout.trainer_dir(rollout_id, attempt)
            self._last = self._thread.submit(
                _write, directory, lambda: to_table(share, rows, step=rollout_id, attempt=attempt)
            )

    def wait(self) -> None:
        """Until the last file is written."""
        if self._last is not None and (error := self._last.exception()) is not None:
            self._complain(f"{type(error).__name__}: {error}")
        self._last = None


def _write(directory: Path, make_table: Callable[[], pa.Table]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / "part-0.parquet") as file:
        pq.write_table(make_table(), file, compression="zstd")


def _speaks_for_its_samples() -> bool:
    """One rank of those that have the same samples: the last pipeline stage computes the log-probs."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    )


def write_train_data(
    template: str, rollout_id: int, rank: int, share: RankShare, inputs: LossInputs[Flat]
) -> Path:
    """--save-debug-train-data: write this rank's samples of a rollout, with every input of the loss, as Parquet.

    Args:
        template: Name of the file, with `{rollout_id}` and `{rank}`.
        inputs: They become columns of their names, with one entry a trainable token.
    """
    batch = share.batch
    columns: dict[str, Any] = {
        "sample": share.samples,  # position in the rollout
        "tokens": [batch.tokens[i] for i in share.samples],
        "response_length": [batch.response_lengths[i] for i in share.samples],
        "loss_mask": [batch.loss_masks[i] for i in share.samples],
        "train_reward": [float(batch.train_rewards[i]) for i in share.samples],
    }
    columns |= {name: [flat[i] for i in share.samples] for name, flat in inputs.given().items()}
    path = Path(template.format(rollout_id=rollout_id, rank=rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd")
    return path
