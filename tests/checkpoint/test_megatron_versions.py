"""A run resumes from a checkpoint of another version of megatron-core, or of slurmlime, optimizer included.

Each `tests/recorded/NAME.tar.gz` holds a model with a dense layer and one with experts, its checkpoint after two
rollouts, and the metrics of a third. `python tests/checkpoint/test_megatron_versions.py` records one with the
megatron-core that is installed; `tests/recorded/version_0_1/record_checkpoint.py` with slurmlime 0.1.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers.megatron import (
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    write_hf_model,
)

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parents[1] / "recorded"
MODEL = tiny_config(
    "Qwen3MoeForCausalLM",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    norm_topk_prob=True,
    mlp_only_layers=[0],
)
FLAGS: dict[str, Any] = {
    "use_distributed_optimizer": True,
    "lr_decay_style": "cosine",
    "adam_eps": 1e-3,
}


def metrics_of_the_third_rollout(actor: Any) -> dict[str, float]:
    metrics = actor.train(2, make_batch(8, seed=2))
    return {name: value for name, value in metrics.items() if name.startswith("train/")}


@pytest.mark.parametrize(
    "recorded",
    [
        "slurmlime_0.1",
        "megatron_core_0.16.1",
        "megatron_core_0.17.1",
        "megatron_core_0.18.2",
        "megatron_core_0.19.2",
    ],
)
def test_a_run_resumes_from_a_checkpoint_of_another_version(recorded: str, tmp_path: Path) -> None:
    with tarfile.open(RECORDED / f"{recorded}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    init_single_process()
    actor = make_actor(make_config(tmp_path / "model", save=str(tmp_path / "checkpoints"), **FLAGS), tmp_path)
    assert actor.start_rollout_id == 2
    expected = json.loads((tmp_path / "third.json").read_text())
    metrics = metrics_of_the_third_rollout(actor)
    # Version 0.1 had fewer metrics.
    assert expected.keys() == metrics.keys() or recorded == "slurmlime_0.1"
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=2e-6)


def record(work: Path) -> Path:
    """Train, save and go on with the installed version; the archive."""
    import megatron.core

    init_single_process()
    model = write_hf_model(work / "model", MODEL)
    actor = make_actor(make_config(model, save=str(work / "checkpoints"), **FLAGS), work)
    for i in range(2):
        actor.train(i, make_batch(8, seed=i))
    assert actor.save(1) is not None
    (work / "third.json").write_text(json.dumps(metrics_of_the_third_rollout(actor), indent=1))
    path = RECORDED / f"megatron_core_{megatron.core.__version__}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("model", "checkpoints", "third.json"):
            archive.add(work / name, name)
    return path


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        print(record(Path(directory)))
