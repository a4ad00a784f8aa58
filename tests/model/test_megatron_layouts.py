"""Every way to split a model over four ranks against one process: loss, log-probs, each gradient, the step.

Tolerances: in fp32 what differs is the order of sums; gradients are up to about 0.1. In bf16 sums over tensor
parallel ranks are rounded too; what is compared is then the size of the difference, of all numbers together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    adamw_step,
    by_sizes,
    gather_gradients,
    in_each_layout,
    in_rounds,
    init_single_process,
    keep_log_probs,
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
from rltrain.data.batch import TrainableTokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test waits for every layout

LOG_PROB_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-6, 1e-5
BF16_LOG_PROB_TOLERANCE, BF16_GRADIENT_TOLERANCE, BF16_UPDATE_TOLERANCE = 0.03, 0.04, 0.1

TP2, SP = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PP2, PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
VPP2 = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
ETP1, ETP2 = {"expert_tensor_parallel_size": 1}, {"expert_tensor_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
LAYOUTS_OF_A_GROUP = 13  # of rank processes: they gather threads
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "megatron": {"transformer": {"recompute_modules": modules}}}


# Ranks that are not named are data parallel.
DENSE: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-sharded": SHARDED,
    "tp2": TP2,
    "tp2-sp-sharded": TP2 | SP | SHARDED,
    "pp2": PP2,
    "pp2-sharded": PP2 | SHARDED,
    "pp4": PP4,
    "pp2-uneven": PP2 | {"decoder_first_pipeline_num_layers": 1},
    "pp2-vpp2": VPP2,
    "tp2-pp2-sp": TP2 | PP2 | SP,
    "tp2-pp2-vpp2-sp-sharded": TP2 | VPP2 | SP | SHARDED,
    "cp2": CP2,
    "cp4": CP4,
    "cp2-sharded": CP2 | SHARDED,
    "tp2-cp2-sp": TP2 | CP2 | SP,
    "pp2-cp2": PP2 | CP2,
    "pp2-vpp2-cp2": VPP2 | CP2,
}
TIED: dict[str, dict[str, Any]] = {
    "tied-pp2-sharded": PP2 | SHARDED,
    "tied-tp2-pp2": TP2 | PP2,
    "tied-pp2-vpp2-cp2": VPP2 | CP2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "ep2": EP2,
    "ep4-sharded": EP4 | SHARDED,
    "ep2-allgather": EP2 | ALLGATHER,
    "ep2-tp2": EP2 | TP2 | SP | ETP1,
    "tp2-whole-experts-sharded": TP2 | SP | ETP1 | SHARDED,
    "ep2-tp2-etp2-sharded": EP2 | TP2 | SP | ETP2 | SHARDED,
    "etp2-allgather": TP2 | SP | ETP2 | ALLGATHER,
    "pp2-ep2": PP2 | EP2,
    "pp2-vpp2-ep2-sharded": VPP2 | EP2 | SHARDED,
    "cp2-ep2": CP2 | EP2,
    "pp2-tp2-ep2": PP2 | TP2 | SP | EP2 | ETP1,
}
GLM4: dict[str, dict[str, Any]] = {
    "glm4-tp2-pp2": TP2 | PP2,
    "glm4-tp2-cp2-sp-sharded": TP2 | CP2 | SP | SHARDED,
}
GPT_OSS: dict[str, dict[str, Any]] = {
    "gpt-oss-tp2-cp2-ep2-sharded": TP2 | CP2 | SP | EP2 | ETP1 | SHARDED,
    "gpt-oss-tp2-pp2": TP2 | PP2 | SP | ETP1,
}
BALANCED: dict[str, dict[str, Any]] = {
    "balanced-pp2-tp2-ep2": PP2 | TP2 | SP | EP2 | ETP1,
    "balanced-tp2-cp2-ep4": TP2 | SP | CP2 | EP4 | ETP1,
}
CUSTOM: dict[str, dict[str, Any]] = {
    "custom-cp2": CP2,
    "custom-tp2-cp2-sp": TP2 | CP2 | SP,
}
# With the layout that it has to equal, bit by bit.
RECOMPUTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tp2-sp-sharded-full": ("dense", "tp2-sp-sharded", FULL),
    "tp2-sp-sharded-selective": ("dense", "tp2-sp-sharded", selective("core_attn")),
    "pp2-full": ("dense", "pp2", FULL),
    "cp2-full": ("dense", "cp2", FULL),
    "dp4-sharded-full": ("dense", "dp4-sharded", FULL),
    "ep2-full": ("experts", "ep2", FULL),
    "ep2-selective": ("experts", "ep2", selective("core_attn", "moe")),
}
BF16: dict[str, dict[str, Any]] = {
    "bf16-tp2-sp-sharded": TP2 | SP | SHARDED,
    "bf16-pp2": PP2,
    "bf16-cp2": CP2,
    "bf16-dp4-sharded": SHARDED,
}
BF16_EXPERTS: dict[str, dict[str, Any]] = {"bf16-ep2": EP2}
LAYOUTS = {
    "dense": DENSE,
    "tied": TIED,
    "experts": EXPERTS,
    "balanced": BALANCED,
    "glm4": GLM4,
    "gpt-oss": GPT_OSS,
    "bf16": BF16,
    "bf16-experts": BF16_EXPERTS,
    "custom": CUSTOM,
}
CONFIGS = {
    "dense": tiny_config(num_hidden_layers=4),
    "tied": tiny_config(num_hidden_layers=4, tie_word_embeddings=True),
    "glm4": tiny_config("Glm4ForCausalLM", pad_token_id=None),
    "gpt-oss": tiny_config("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "experts": tiny_experts_config(),
}
CONFIGS |= {
    "balanced": CONFIGS["experts"],
    "bf16": CONFIGS["dense"],
    "custom": CONFIGS["dense"],
    "bf16-experts": CONFIGS["experts"],
}
BF16_FLAGS: dict[str, Any] = {"bf16": True, "lr": 1e-2}
# The loss that balances experts is a mean over micro-batches, so it is the same only with the same ones.
OF_KIND: dict[str, dict[str, Any]] = {
    "balanced": {"moe_aux_loss_coeff": 0.5, "max_tokens_per_gpu": 1000},
    "bf16": BF16_FLAGS,
    "bf16-experts": BF16_FLAGS,
    "custom": {
        "loss_type": "custom_loss",
        "custom_loss_function_path": f"{__name__}.loss_of_whole_responses",
        "use_tis": False,
    },
}
COMMON: dict[str, Any] = {
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 40,
    "log_probs_max_tokens_per_gpu": 55,  # two micro-batches of each of two data parallel ranks
    "advantage_estimator": "reinforce_plus_plus",
    "kl_coef": 0.1,
    "normalize_advantages": True,
    "use_kl_loss": True,
    "kl_loss_coef": 0.05,
    "kl_loss_type": "k3",
    "entropy_coef": 0.01,
    "use_tis": True,
    "clip_grad": 0.05,
    "adam_eps": 1e-3,
}


def layout_config(models: Path, kind: str, changes: dict[str, Any]) -> Config:
    reference = str(models / f"{kind}-reference")
    policy = str(models / kind)
    return make_config(
        models / kind, load=policy, ref_load=reference, **(COMMON | OF_KIND.get(kind, {}) | changes)
    )


def loss_of_whole_responses(
    args: argparse.Namespace, batch: dict[str, Any], logits: torch.Tensor, sum_of_sample_mean: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """With slime's signature; it cannot be computed from parts of a response, nor without the tokens before it."""
    from rltrain.megatron.custom_loss import response_log_probs

    log_probs, entropies = response_log_probs(args, batch, logits)
    means = torch.cat([each.mean().exp().expand_as(each) for each in log_probs])
    loss = sum_of_sample_mean(-torch.cat(batch["advantages"]) * means)
    entropy = sum_of_sample_mean(torch.cat(entropies))
    assert [len(tokens) for tokens in batch["unconcat_tokens"]] == batch["total_lengths"]
    return loss - 0.1 * entropy, {"entropy": entropy.detach()}


def step(config: Config, work: Path) -> dict[str, Any]:
    """One optimizer step, taken apart, and a second one with fewer samples.

    Returns:
        Metrics, the log-probs of this rank's samples, and how often its first attention ran; on rank 0 also, in
        Hugging Face's names, the first step's gradients and the weights after it.
    """
    from rltrain.megatron.custom_loss import custom_loss
    from rltrain.megatron.model.export import export_hf_weights, export_own_share
    from rltrain.megatron.training.forward_backward import forward_backward, token_loss
    from rltrain.megatron.training.share import RankShare
    from rltrain.run.timing import Timers

    actor = make_actor(config, Path(f"{config.model.hf_checkpoint}-run"))
    policy, shape = actor.policy, actor.shape
    share = RankShare(config, shape, make_batch(11, seed=0, masked=1))
    computed = keep_log_probs(actor)
    inputs, _ = actor._prepare(0, share, share.loss_inputs(), Timers())
    del actor.log_probs_and_entropy  # the method itself again
    log_probs = {i: each for i, each in enumerate(computed[""][0]) if len(each)}
    attention, calls = policy.models[0].decoder.layers[0].self_attention.core_attention, []
    hook = attention.register_forward_pre_hook(lambda *inputs: calls.append(1))
    loss = custom_loss if config.algorithm.loss_type == "custom_loss" else token_loss
    sums = forward_backward(policy.wrapped, share.micro_batches(0, inputs), loss(shape, config))
    hook.remove()
    gather_gradients(policy.wrapped)
    gradients = export_hf_weights(policy.models, shape, lambda weight: weight.main_grad, bucket_bytes=15_000)
    gradients = {name: tensor.float().clone().numpy() for name, tensor in gradients}
    grad_norm = policy.update(sums).grad_norm
    weights = {name: t.float().clone().numpy() for name, t in export_hf_weights(policy.models, shape)}
    share_of_export = in_rounds(export_own_share(policy.models, shape, bucket_bytes=10_000))
    share_of_few = in_rounds(export_own_share(policy.models, shape, bucket_bytes=10_000, takers=[3]))
    metrics = {"first_grad_norm": grad_norm, **actor.train(1, make_batch(8, seed=1, masked=1))}
    return {"metrics": metrics, "log_probs": log_probs, "gradients": gradients, "weights": weights,
            "share_of_export": share_of_export, "share_of_few": share_of_few,
            "attention_calls": len(calls)}  # fmt: skip


def steps(configs: dict[str, Config], work: Path) -> dict[str, dict[str, Any]]:
    """`step` in every layout."""
    return in_each_layout(step, configs, work)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for kind, config in CONFIGS.items():
        write_hf_model(directory / kind, config)
        write_hf_model(directory / f"{kind}-reference", config, seed=1)
    return directory


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process makes of each model."""
    init_single_process()
    work = tmp_path_factory.mktemp("single")
    return {kind: step(layout_config(models, kind, {}), work) for kind in CONFIGS}


@pytest.fixture(scope="module")
def on_four(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, dict[str, Any]]]:
    """What every rank of four makes of each layout that a selected test asks for."""
    here = [
        item for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    wanted = {item.callspec.params["layout"] for item in here}
    wanted |= {RECOMPUTED[name][1] for name in wanted & RECOMPUTED.keys()}
    every = [(name, kind, changes) for kind, layouts in LAYOUTS.items() for name, changes in layouts.items()]
    every += [(name, kind, LAYOUTS[kind][plain] | more) for name, (kind, plain, more) in RECOMPUTED.items()]
    configs = {
        name: layout_config(models, kind, {"actor_num_gpus_per_node": 4, **changes})
        for name, kind, changes in every
        if name in wanted
    }
    ranks: list[dict[str, dict[str, Any]]] = [{} for _ in range(4)]
    names = list(configs := by_sizes(configs))
    for first in range(0, len(names), LAYOUTS_OF_A_GROUP):
        some = {name: configs[name] for name in names[first : first + LAYOUTS_OF_A_GROUP]}
        work = tmp_path_factory.mktemp("four")
        for rank, found in zip(ranks, run_ranks(steps, some, work, world_size=4), strict=True):
            rank |= found
    return ranks


EXACT = [(kind, layout) for kind in LAYOUTS if not kind.startswith("bf16") for layout in LAYOUTS[kind]]
ROUNDED = [(kind, layout) for kind in LAYOUTS if kind.startswith("bf16") for layout in LAYOUTS[kind]]


@pytest.mark.parametrize(("kind", "layout"), EXACT)
def test_four_ranks_equal_one(
    kind: str,
    layout: str,
    single: dict[str, dict[str, Any]],
    on_four: list[dict[str, dict[str, Any]]],
) -> None:
    expected, ranks = single[kind], [rank[layout] for rank in on_four]
    ours = ranks[0]
    assert all(rank["metrics"] == ours["metrics"] for rank in ranks)
    assert ours["metrics"] == pytest.approx(expected["metrics"], rel=1e-4, abs=2e-6)
    log_probs = {i: values for rank in ranks for i, values in rank["log_probs"].items()}
    assert log_probs.keys() == expected["log_probs"].keys()
    for i, values in log_probs.items():
        np.testing.assert_allclose(values, expected["log_probs"][i], atol=LOG_PROB_TOLERANCE, rtol=0)
    for what, tolerance in (("gradients", GRADIENT_TOLERANCE), ("weights", WEIGHT_TOLERANCE)):
        assert ours[what].keys() == expected[what].keys()
        for name, values in ours[what].items():
            np.testing.assert_allclose(values, expected[what][name], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize(("kind", "layout"), EXACT)
def test_ranks_share_an_export_out(kind: str, layout: str, on_four: list[dict[str, dict[str, Any]]]) -> None:
    weights = on_four[0][layout]["weights"]
    for which in ("share_of_export", "share_of_few"):
        shares = [rank[layout][which] for rank in on_four]
        names = [name for share in shares for name in share]
        assert sorted(names) == sorted(weights)  # each once
        assert all(
            np.array_equal(values, weights[name]) for share in shares for name, values in share.items()
        )
        assert which == "share_of_few" or all(shares)  # and no rank is idle
    assert shares[3]  # the only one that was asked to take some


@pytest.mark.parametrize("layout", RECOMPUTED)
def test_recomputing_activations_changes_no_bit(
    layout: str, on_four: list[dict[str, dict[str, Any]]]
) -> None:
    for rank in on_four:
        ours, plain = rank[layout], rank[RECOMPUTED[layout][1]]
        assert ours["attention_calls"] == 2 * plain["attention_calls"] > 0
        assert ours["metrics"] == plain["metrics"]
        for what in ("gradients", "weights", "log_probs"):
            assert ours[what].keys() == plain[what].keys()
            assert all(np.array_equal(values, plain[what][key]) for key, values in ours[what].items())


def joined(tensors: dict[str, Any]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def difference(ours: np.ndarray, expected: np.ndarray, size_of: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(size_of))


def first_weights(models: Path, kind: str, names: Any) -> dict[str, torch.Tensor]:
    weights = load_file(models / kind / "model.safetensors")
    return {name: weights[name].bfloat16() for name in names}


@pytest.mark.parametrize(("kind", "layout"), ROUNDED)
def test_bf16_on_four_ranks_is_bf16_on_one(
    kind: str,
    layout: str,
    models: Path,
    single: dict[str, dict[str, Any]],
    on_four: list[dict[str, dict[str, Any]]],
) -> None:
    expected, ranks = single[kind], [rank[layout] for rank in on_four]
    ours = ranks[0]
    assert all(rank["metrics"] == ours["metrics"] for rank in ranks)
    for name in ("first_grad_norm", "train/loss", "train/grad_norm"):
        assert ours["metrics"][name] == pytest.approx(expected["metrics"][name], rel=0.03, abs=3e-3)
    log_probs = {i: values for rank in ranks for i, values in rank["log_probs"].items()}
    assert log_probs.keys() == expected["log_probs"].keys()
    for i, values in log_probs.items():
        np.testing.assert_allclose(values, expected["log_probs"][i], atol=BF16_LOG_PROB_TOLERANCE, rtol=0)
    gradients = joined(ours["gradients"]), joined(expected["gradients"])
    assert difference(*gradients, gradients[1]) < BF16_GRADIENT_TOLERANCE
    before = first_weights(models, kind, expected["weights"])
    weights = joined(ours["weights"]), joined(expected["weights"])
    update = weights[1] - joined({name: weight.float().numpy() for name, weight in before.items()})
    assert difference(*weights, update) < BF16_UPDATE_TOLERANCE


def test_bf16_is_that_of_transformers_and_of_adamw_on_fp32_weights(
    models: Path, single: dict[str, dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    ours, config = single["bf16"], layout_config(models, "bf16", {})
    model = AutoModelForCausalLM.from_pretrained(models / "bf16", dtype=torch.bfloat16)
    batch = make_batch(11, seed=0, masked=1)
    trainable = TrainableTokens.of(batch)
    for i, values in ours["log_probs"].items():
        ids = torch.from_numpy(batch.tokens[i].astype(np.int64))
        with torch.no_grad():
            logits = model(ids.unsqueeze(0)).logits[0, :-1].float()
        expected = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)[trainable.positions[i]]
        np.testing.assert_allclose(values, expected, atol=BF16_LOG_PROB_TOLERANCE, rtol=0)
    exact = joined(single["dense"]["gradients"])
    assert difference(joined(ours["gradients"]), exact, exact) < BF16_GRADIENT_TOLERANCE
    expected_weights = adamw_step(first_weights(models, "bf16", ours["weights"]), ours["gradients"], config)
    for name, weight in expected_weights.items():
        np.testing.assert_array_equal(ours["weights"][name], weight.float().numpy(), err_msg=name)
