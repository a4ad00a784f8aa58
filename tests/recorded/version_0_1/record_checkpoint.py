"""Make `../slurmlime_0.1.tar.gz`: `PYTHON_OF_0.1 record_checkpoint.py SOURCE_OF_0.1 TARGET`.

What `tests/checkpoint/test_megatron_versions.py` records with the present version, by the trainer of version 0.1.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
FLAGS: dict[str, Any] = {"use_distributed_optimizer": True, "lr_decay_style": "cosine", "adam_eps": 1e-3}


def main() -> None:
    """Train two steps, save, train a third."""
    source, target = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "tests")]
    from helpers import megatron

    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        megatron.init_single_process()
        model = megatron.write_hf_model(work / "model", megatron.tiny_config("Qwen3MoeForCausalLM", **MODEL))
        args = megatron.make_args(model, save=str(work / "checkpoints"), **FLAGS)
        actor = megatron.make_actor(args, work)
        for i in range(2):
            actor.train(i, megatron.make_batch(8, seed=i))
        actor.save(1)
        metrics = actor.train(2, megatron.make_batch(8, seed=2))
        third = {name: value for name, value in metrics.items() if name.startswith("train/")}
        (work / "third.json").write_text(json.dumps(third, indent=1))
        with tarfile.open(target / "slurmlime_0.1.tar.gz", "w:gz") as archive:
            for name in ("model", "checkpoints", "third.json"):
                archive.add(work / name, name)


if __name__ == "__main__":
    main()
