"""`--save-debug-train-data`: what a rank trained on, sample by sample, with every input of the loss, as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rltrain.data.trainable import Flat
from rltrain.megatron.rank_share import RankShare


def write_train_data(
    template: str, rollout_id: int, rank: int, share: RankShare, values: dict[str, Flat]
) -> Path:
    """Write this rank's samples of a rollout.

    Args:
        template: Name of the file, with `{rollout_id}` and `{rank}`.
        values: Inputs of the loss, one entry a trainable token, by name (`advantages`, `ref_log_probs`, …).
    """
    batch = share.batch
    columns: dict[str, Any] = {
        "sample": share.samples,  # position in the rollout
        "tokens": [batch.tokens[i] for i in share.samples],
        "response_length": [batch.response_lengths[i] for i in share.samples],
        "loss_mask": [batch.loss_masks[i] for i in share.samples],
        "train_reward": [float(batch.train_rewards[i]) for i in share.samples],
    }
    columns |= {name: [flat[i] for i in share.samples] for name, flat in values.items()}
    path = Path(template.format(rollout_id=rollout_id, rank=rank))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)
    return path
