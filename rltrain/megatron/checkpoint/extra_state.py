"""TransformerEngine's `_extra_state`: what its layers keep beside weights, for FP8. Other layers have none of it.

So a checkpoint may have it or not (the converters, and trainers without TransformerEngine, write none), and so may the
model that reads it. Without it a layer begins as a new one does, which is right for all types but FP8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from rltrain.megatron.model.layers.lora import is_adapter

MARK = "_extra_state"


def drop_absent(content: dict[str, Any], checkpoint: Path) -> None:
    """Take what the checkpoint (`torch_dist`) does not have out of a model's sharded state, in place."""
    wanted = {name: each.key for name, each in content.items() if _is_extra(each)}
    if not wanted:
        return
    stored = {each.key for each in load_sharded_metadata(str(checkpoint)).values()}
    for name, key in wanted.items():
        if key not in stored:
            del content[name]


def load_weights(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` that is strict with all but `_extra_state`, and adapters where the state has none of them.

    Raises:
        RuntimeError: keys are missing, or are not the model's.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    if not any(map(is_adapter, state)):
        missing = [name for name in missing if not is_adapter(name)]
    wrong = sorted(name for name in [*missing, *unexpected] if MARK not in name)
    if wrong:
        raise RuntimeError(f"missing in the checkpoint, or unknown to the model: {', '.join(wrong)}")


def _is_extra(each: object) -> bool:
    return isinstance(each, ShardedObject) and MARK in each.key
