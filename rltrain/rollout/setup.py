"""What the rollout process works out once from the flags and the model's config, and puts beside the flags."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

from hpc.layout import RunLayout

_UNLIMITED = 1 << 30


def prepare_args(args: argparse.Namespace, layout: RunLayout) -> None:
    """Add `rollout_state_dir` and `vocab_size`, and give `rollout_max_context_len` the engines' limit."""
    config = json.loads((Path(args.hf_checkpoint) / "config.json").read_text())
    args.rollout_state_dir = str(layout.rollout_state)
    args.vocab_size = config["vocab_size"]
    args.rollout_max_context_len = min(
        args.rollout_max_context_len or _UNLIMITED, context_length(config, args.sglang)
    )


def collect_garbage_rarely() -> None:
    """Have Python look for reference cycles less often: answers are made of many small lists without any, and looking
    through the lists of all samples again and again would take a quarter of what this process does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def context_length(config: dict[str, Any], sglang: dict[str, Any]) -> int:
    """Tokens, prompt and response together, that the engines take: as asked for, else what the model has."""
    return sglang.get("context_length") or config.get("max_position_embeddings") or _UNLIMITED
