"""LoRA against transformers with PEFT's formula in hooks: log-probs, and the adapters after optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    in_each_layout,
    init_single_process,
    log_probs_of,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    tiny_experts_config,
    write_hf_model,
)
from safetensors.torch import load_file

from rltrain.arguments.config import Config
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

RANK, ALPHA = 3, 12.0
PREFIX = "base_model.model."
COMMON: dict[str, Any] = {
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "lora_target_modules": ["all-linear"],
    "lr": 0.02,
    "adam_eps": 1e-3,  # with a tiny one Adam's first steps turn rounding of small gradients into ±lr
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 60,
    "log_probs_max_tokens_per_gpu": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": tiny_config(),
    # query, key and value are one module, gate and up another
    "phi3": tiny_config("Phi3ForCausalLM", pad_token_id=None),
    "gemma3": tiny_config(  # norms multiply by 1 + their weight
        "Gemma3ForCausalLM", pad_token_id=None, query_pre_attn_scalar=8, hidden_activation="gelu_pytorch_tanh",
        layer_types=["sliding_attention", "full_attention"], sliding_window=7, rope_local_base_freq=100.0,
    ),
    "olmo2": tiny_config("Olmo2ForCausalLM", pad_token_id=None),  # no norms before attention and MLP
    "experts": tiny_experts_config(num_hidden_layers=2, mlp_only_layers=[1]),
}  # fmt: skip
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2-distributed-optimizer": ("qwen3", {"use_distributed_optimizer": True}),
    "tp2": ("qwen3", {"tensor_model_parallel_size": 2}),
    "tp2-sp": ("qwen3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2-sp-phi3": ("phi3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": ("qwen3", {"pipeline_model_parallel_size": 2}),
    "cp2": ("qwen3", {"context_parallel_size": 2}),
    "ep2-tp2": (
        "experts",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2,
         "expert_tensor_parallel_size": 1},
    ),
}  # fmt: skip
BATCHES = [make_batch(9, seed=seed, masked=1) for seed in range(3)]

Numbers = tuple[list[Any], dict[str, Any]]


class Reference:
    """transformers' model with adapters of PEFT's names, trained with torch's AdamW."""

    def __init__(self, model_dir: Path, start: Mapping[str, torch.Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).requires_grad_(
            False
        )
        self.adapters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        for name in {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in start}:
            self.model.get_submodule(name).register_forward_hook(self._adapter(name))
        self.optimizer = torch.optim.AdamW(
            self.adapters.values(),
            lr=COMMON["lr"],
            betas=(0.9, 0.999),
            eps=COMMON["adam_eps"],
            weight_decay=0.1,
        )

    def _adapter(self, name: str) -> Any:
        a, b = (self.adapters[f"{PREFIX}{name}.lora_{kind}.weight"] for kind in "AB")
        return lambda module, inputs, output: output + ALPHA / RANK * (inputs[0] @ a.T @ b.T)

    def log_probs(self, tokens: Any, length: int) -> torch.Tensor:
        ids = torch.from_numpy(tokens.astype(np.int64))
        log_p = torch.log_softmax(self.model(ids.unsqueeze(0)).logits[0, :-1], -1)
        return log_p.gather(1, ids[1:, None]).squeeze(1)[-length:]

    def train(self, batch: Any) -> tuple[float, float]:
        """One optimizer step on GRPO's loss, the ratio being 1; the loss and the gradient's norm."""
        losses = []
        for tokens, length, mask, reward in zip(
            batch.tokens, batch.response_lengths, batch.loss_masks, batch.train_rewards, strict=True
        ):
            log_probs = self.log_probs(tokens, length)
            each = -reward * (log_probs - log_probs.detach()).exp() * torch.from_numpy(mask)
            losses.append(each.sum() / max(1, mask.sum()))
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapters.values(), 1.0)
        self.optimizer.step()
        return loss.item(), norm.item()


def adapters_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def train(config: Config, work: Path) -> dict[str, Any]:
    """Two rollouts, a checkpoint, and a third by another trainer that goes on from it."""
    config = config.replace(save=str(work / "checkpoints"))
    actor = make_actor(config, work)
    actor.export(work / "start")
    metrics = [actor.train(i, BATCHES[i]) for i in range(2)]
    actor.save(1)
    resumed = make_actor(config, work)
    assert resumed.start_rollout_id == 2
    metrics.append(resumed.train(2, BATCHES[2]))
    before = [weight.clone() for weight in resumed.models[0].parameters()]
    resumed.export(work / "end")
    assert all(
        map(torch.equal, before, resumed.models[0].parameters())
    )  # merging leaves the trainer's own alone
    return {"metrics": metrics, "log_probs": log_probs_of(resumed, BATCHES[0])}


def train_all(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    return in_each_layout(train, configs, work)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        write_hf_model(directory / name, config)
    return directory


def check(trained: dict[str, Any], model_dir: Path, work: Path) -> None:
    """Compare metrics, adapters, and what the exported model computes, with the reference's."""
    from transformers import AutoModelForCausalLM

    start = adapters_in(work / "start")
    reference = Reference(model_dir, start)
    for metrics, batch in zip(trained["metrics"], BATCHES, strict=True):
        loss, norm = reference.train(batch)
        assert metrics["train/loss"] == pytest.approx(loss, abs=2e-6)
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-3)
    end = adapters_in(work / "end")
    assert end.keys() == start.keys()
    for name, adapter in end.items():
        assert (adapter - reference.adapters[name]).abs().max() < 2e-5, name
        assert (adapter - start[name]).abs().max() > 1e-3, name
    merged = AutoModelForCausalLM.from_pretrained(work / "end", dtype=torch.float32)
    base = load_file(model_dir / "model.safetensors")
    for tokens, length in zip(BATCHES[0].tokens, BATCHES[0].response_lengths, strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            log_p = merged(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            torch.testing.assert_close(
                log_p[-length:], reference.log_probs(tokens, length), atol=1e-4, rtol=0
            )
    adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in end}
    for name, weight in {
        k: v for f in (work / "end").glob("*.safetensors") for k, v in load_file(f).items()
    }.items():
        assert torch.equal(weight, base[name]) == (name.removesuffix(".weight") not in adapted), name


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_equals_transformers_with_adapters(name: str, models: Path, tmp_path: Path) -> None:
    init_single_process()
    check(train(make_config(models / name, **COMMON), tmp_path), models / name, tmp_path)


@pytest.fixture(scope="module")
def double(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two ranks makes of every layout, and where."""
    configs = {
        name: make_config(models / model, **COMMON, actor_num_gpus_per_node=2, **changes)
        for name, (model, changes) in LAYOUTS.items()
    }
    work = tmp_path_factory.mktemp("double")
    return run_ranks(train_all, configs, work), work


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_transformers_with_adapters(
    layout: str, models: Path, double: tuple[list[dict[str, Any]], Path]
) -> None:
    ranks, work = double
    check(ranks[0][layout], models / LAYOUTS[layout][0], work / layout)


def test_few_layers_recomputed_with_a_reference(models: Path, tmp_path: Path) -> None:
    """Adapters on some modules of a fused layer; all is recomputed; the reference is the model without them."""
    init_single_process()
    changes = COMMON | {
        "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
        "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3",
    }  # fmt: skip
    actor = make_actor(make_config(models / "qwen3", **changes), tmp_path)
    frozen = log_probs_of(actor, BATCHES[0])
    assert actor.train(0, BATCHES[0])["train/kl_loss"] == pytest.approx(0.0, abs=1e-9)
    assert actor.train(1, BATCHES[0])["train/kl_loss"] > 1e-5
    actor.export(tmp_path / "end")
    adapters = adapters_in(tmp_path / "end")
    assert {name.split(".")[-3] for name in adapters} == {"q_proj", "v_proj", "down_proj"}
    assert all(adapter.abs().max() > 0 for adapter in adapters.values())  # the first layer's too
    settings = json.loads((tmp_path / "end" / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert settings["base_model_name_or_path"] == str(models / "qwen3")
    with actor.others.reference.in_place_of(actor.models):
        for ours, theirs in zip(log_probs_of(actor, BATCHES[0]), frozen, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_checkpoints_know_their_adapters(models: Path, tmp_path: Path) -> None:
    from rltrain.tools.convert_torch_dist_to_hf import main as convert

    init_single_process()
    lora = make_config(models / "qwen3", **COMMON, save=str(tmp_path / "lora"))
    actor = make_actor(lora, tmp_path)
    actor.train(0, BATCHES[0])
    actor.save(0)
    actor.export(tmp_path / "end")
    for changes, words in (
        ({"lora_rank": 0}, "was trained with --lora-rank 3 --lora-alpha 12 .* this run has no adapters"),
        ({"lora_alpha": 6.0}, "this run has --lora-rank 3 --lora-alpha 6 "),
    ):
        with pytest.raises(UserError, match=words):
            make_actor(lora.replace(**changes), tmp_path)
    merged = convert(
        ["--input-dir", str(tmp_path / "lora"), "--output-dir", str(tmp_path / "converted"),
         "--origin-hf-dir", str(models / "qwen3")]
    )  # fmt: skip
    ours, theirs = (load_file(each / "model.safetensors") for each in (merged, tmp_path / "end"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    init_single_process()
    # A run that trains all weights gives a run with adapters its weights, and not its optimizer.
    whole = make_actor(make_config(models / "qwen3", save=str(tmp_path / "whole")), tmp_path)
    whole.train(0, BATCHES[0])
    whole.save(0)
    begins = make_config(models / "qwen3", **COMMON, load=str(tmp_path / "whole"))
    with pytest.raises(UserError, match=r"trained without --lora-rank.* Give --finetune"):
        make_actor(begins, tmp_path)
    again = make_actor(begins.replace(finetune=True), tmp_path)
    assert again.start_rollout_id == 0
    for one, other in zip(log_probs_of(again, BATCHES[0]), log_probs_of(whole, BATCHES[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
