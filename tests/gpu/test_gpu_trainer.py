"""What to run first on a GPU node, part two: the trainer's numbers against the CPU's, and its speed. `make test-gpu`.

The ranks are new processes: of those for the CPU CUDA hides its GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    write_config,
    write_hf_model,
)
from model.test_families import SWITCHES
from on_gpu import CPU_ONLY, EVERYWHERE, environment, needs_gpu, report
from training.test_megatron_shared_prompts import GROUPS, grouped_batch, layout_flags

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.models.families import FAMILIES

pytestmark = pytest.mark.slow

# Kernels of GPUs want heads of 64 and more.
SHAPE = tiny_config(hidden_size=128, head_dim=64, intermediate_size=256)
BF16 = {"bf16": True, "use_distributed_optimizer": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": BF16,
    "bf16, recompute": BF16 | RECOMPUTE,
    "bf16, optimizer on every rank": {"bf16": True},
    "bf16, without TransformerEngine": BF16,
}
SPEED_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": SHAPE,
    "0.5B": tiny_config(
        num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14, head_dim=64,
        vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096, initializer_range=0.02,
    ),
    "1.7B": tiny_config(
        num_hidden_layers=28, hidden_size=2048, intermediate_size=6144, num_attention_heads=16, head_dim=128,
        num_key_value_heads=8, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=0.02,
    ),
}  # fmt: skip
ROOM = {"tiny": 0.0, "0.5B": 20e9, "1.7B": 60e9}  # bytes of a GPU, with room for logits


def steps(configs: dict[str, Config], work: Path) -> dict[str, dict[str, Any]]:
    """What the trainer makes of one rollout, of many lengths that are packed together, for each configuration."""
    return {name: step(name, each, work / name, make_batch(8)) for name, each in configs.items()}


def steps_of_groups(configs: dict[str, Config], work: Path) -> dict[str, dict[str, Any]]:
    """The same of samples that share their beginnings."""
    return {name: step(name, each, work / name, grouped_batch(GROUPS)) for name, each in configs.items()}


@contextmanager
def plain_layers() -> Iterator[None]:
    """While entered, models are built without TransformerEngine, also where it is installed."""
    from rltrain.megatron.model import build, specs

    with pytest.MonkeyPatch.context() as patch:
        for module in (specs, build):
            patch.setattr(module, "use_transformer_engine", lambda: False)
        yield


def step(name: str, config: Config, work: Path, batch: TrainBatch) -> dict[str, Any]:
    with plain_layers() if name.endswith("without TransformerEngine") else nullcontext():
        actor = make_actor(config, work)
        before = np.concatenate(log_probs_of(actor, batch))
        metrics = actor.train(0, batch)
        after = np.concatenate(log_probs_of(actor, batch))
    return {
        "device": str(actor.models[0].output_layer.weight.device),
        "log_probs": before,
        "change": after - before,
        "grad_norm": metrics["train/grad_norm"],
    }


def one_rank(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], function: Callable[..., Any], *args: Any
) -> Any:
    with monkeypatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return run_ranks(function, *args, world_size=1)[0]


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_step_is_that_of_fp32_on_the_cpu(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With packed attention in one call or a call a length, recomputation, and the optimizer sharded or not."""
    model = write_hf_model(tmp_path / "model", SHAPE)
    configs = {name: make_config(model, **changes) for name, changes in CASES.items()}
    alone = {"fp32": configs["fp32"]}
    exact = one_rank(monkeypatch, CPU_ONLY, steps, alone, tmp_path / "exact")["fp32"]
    found = one_rank(monkeypatch, environment(where), steps, configs, tmp_path / "found")
    assert exact["device"] == "cpu" and abs(exact["change"]).max() > 0.05
    for name, each in found.items():
        rounding = 5e-3 if name == "fp32" else 0.15  # TF32 on a GPU
        assert each["device"].startswith(where), name
        assert abs(each["log_probs"] - exact["log_probs"]).max() < rounding, name
        assert abs(each["change"] - exact["change"]).max() < 2 * rounding, name
        assert each["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2 * rounding), name
    print(f"{where}: log-probs differ from fp32 on the CPU by at most", end=" ")
    print({name: float(abs(each["log_probs"] - exact["log_probs"]).max()) for name, each in found.items()})


@pytest.mark.parametrize("where", EVERYWHERE)
def test_shared_prompts_change_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, and in bf16 with the kernel for sequences of any lengths, beside TransformerEngine's and without it."""
    model = write_hf_model(tmp_path / "model", SHAPE)
    kinds = {"fp32": {}, "bf16": BF16, "bf16, without TransformerEngine": BF16}
    shared, separate = (
        {
            name: make_config(model, **(layout_flags(share, 120, **flags) | {"random_init": False}))
            for name, flags in kinds.items()
        }
        for share in (True, False)
    )
    ours, theirs = (
        one_rank(monkeypatch, environment(where), steps_of_groups, each, tmp_path / name)
        for name, each in (("shared", shared), ("separate", separate))
    )
    for name, each in ours.items():
        rounding = 1e-4 if name == "fp32" and where == "cpu" else 5e-3 if name == "fp32" else 0.15
        assert abs(each["log_probs"] - theirs[name]["log_probs"]).max() < rounding, name
        assert each["grad_norm"] == pytest.approx(theirs[name]["grad_norm"], rel=2 * rounding), name


def parameters(configs: dict[str, Config], work: Path) -> list[dict[str, Any]]:
    """What each family's model on this rank holds: with this machine's layers, and with plain ones."""
    own = {name: held(each) for name, each in configs.items()}
    with plain_layers():
        return [own, {name: held(each) for name, each in configs.items()}]


def held(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shapes of all parameters, by what they are called in a Hugging Face directory."""
    from rltrain.arguments.hf_config import read_model_shape
    from rltrain.megatron.device import megatron_scope
    from rltrain.megatron.model.build import build_model
    from rltrain.megatron.model.load import local_parameters
    from rltrain.models.directory import read_hf_config

    shape = read_model_shape(read_hf_config(Path(config.model.hf_checkpoint), without_weights=True))
    with megatron_scope():
        models = build_model(shape, config)
    return {each.entry.hf_names: tuple(each.weight.shape) for each in local_parameters(models, shape)}


@pytest.mark.parametrize("where", EVERYWHERE)
def test_layers_of_every_family_hold_what_the_converters_expect(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEngine's have the names and shapes of the plain ones, which are proven against transformers."""
    # Without compressed queries Megatron-core 0.19 can't have TransformerEngine.
    switches = SWITCHES | {"DeepseekV3ForCausalLM": SWITCHES["DeepseekV3ForCausalLM"] | {"q_lora_rank": 24}}
    configs = {
        name: make_config(write_config(tmp_path / name, tiny_config(name, **changes)), bf16=True)
        for name, changes in switches.items()
    }
    own, plain = one_rank(monkeypatch, environment(where), parameters, configs, tmp_path / "work")
    assert own == plain and own.keys() == FAMILIES.keys()
    assert all(len(each) > 10 for each in own.values())


def speed(config: Config, work: Path) -> dict[str, float]:
    """Metrics of the third rollout: kernels are chosen and memory is taken in the first."""
    from rltrain.megatron.actor import MegatronTrainActor
    from rltrain.run.role import RoleContext

    actor = MegatronTrainActor(config, RoleContext(work, 0, "trainer", 0, "", ""), None)  # type: ignore[arg-type]
    shape = actor.shape
    batch = make_batch(32 if shape.vocab_size > 1000 else 8, longest=512, vocab_size=shape.vocab_size)
    return [actor.train(number, batch) for number in range(3)][-1]


@pytest.mark.parametrize(
    ("where", "shape"),
    [("cpu", "tiny"), *(pytest.param("cuda", shape, marks=needs_gpu) for shape in ("0.5B", "1.7B"))],
)
def test_speed(where: str, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens a second and MFU of a step, with everything that the trainer does in it."""
    if where == "cuda" and torch.cuda.mem_get_info()[1] < ROOM[shape]:
        pytest.skip(f"a GPU of {ROOM[shape] / 1e9:.0f} GB is needed for the {shape} shape")
    model = write_config(tmp_path / "model", SPEED_SHAPES[shape])
    config = make_config(
        model,
        random_init=True,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=8192,
        rollout_batch_size=8,
        **BF16,
    )
    found = one_rank(monkeypatch, environment(where), speed, config, tmp_path / "work")
    names = {
        "perf/tokens_per_s_per_rank": "tokens/s",
        "perf/mfu": "MFU",
        "perf/peak_memory_gib": "GiB at most",
    }
    for name, unit in names.items():
        if name in found:
            report({f"{shape}, bf16, one rank": found[name]}, unit)
    assert found["perf/tokens_per_s_per_rank"] > 0
