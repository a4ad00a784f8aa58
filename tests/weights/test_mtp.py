"""The layer for one token more, against the paper's formula with transformers' layers; and what becomes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.megatron import (
    EXPERTS,
    GROUPED_EXPERTS,
    LATENT,
    LINEAR_AND_FULL,
    as_transformers_knows,
    gradient_of,
    in_each_layout,
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    run_ranks,
    tiny_config,
    write_config,
    write_hf_model,
)
from safetensors.torch import load_file, save_file

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainableTokens, TrainBatch
from rltrain.models.families import FAMILIES
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow

LAYERS = 2
TOLERANCE = 1e-5
MODELS: dict[str, dict[str, Any]] = {
    "MiMoForCausalLM": {"num_nextn_predict_layers": 1},
    "Glm4MoeForCausalLM": GROUPED_EXPERTS | {"use_qk_norm": True, "attention_bias": True},
    "DeepseekV3ForCausalLM": LATENT | GROUPED_EXPERTS,
    "Glm4MoeLiteForCausalLM": LATENT
    | GROUPED_EXPERTS
    | {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
    "Qwen3NextForCausalLM": EXPERTS | LINEAR_AND_FULL,
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = TP2 | {
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}  # each rank has half of the experts
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "MiMoForCausalLM": {
        "tp2": TP2,
        "tp2 without sequence parallelism": TP2 | {"sequence_parallel": False},
        "pp2": PP2,
        "dp2": {"use_distributed_optimizer": True},
    },
    "Glm4MoeForCausalLM": {"ep2": EP2},
    "DeepseekV3ForCausalLM": {"pp2": PP2},
    "Glm4MoeLiteForCausalLM": {"ep2": EP2},
    "Qwen3NextForCausalLM": {"tp2": TP2},
}
SCALE = 0.3


def config_of(directory: Path, **changes: Any) -> Config:
    settings = {
        "enable_mtp_training": True,
        "mtp_loss_scaling_factor": SCALE,
        "loss_type": "sft_loss",
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 120,
        "log_probs_max_tokens_per_gpu": 120,
        "adam_eps": 1e-3,  # with a tiny one Adam's first steps turn rounding of small gradients into ±lr
        "clip_grad": 0.0,
    }
    return make_config(directory, **settings | changes)


def batch_with_shared_prompts() -> TrainBatch:
    """Of nine samples three have the same prompt, and two are too short for a further token."""
    batch = make_batch(9, seed=3, longest=20)
    tokens, lengths, masks = [*batch.tokens], [*batch.response_lengths], [*batch.loss_masks]
    prompt = np.arange(10, 22, dtype=np.int32)
    for i in (1, 4, 5):
        tokens[i] = np.concatenate([prompt, tokens[i][-lengths[i] :]])
    for i in (0, 7):
        tokens[i], lengths[i], masks[i] = tokens[i][:2], 1, np.ones(1, np.int8)
    return replace(batch, tokens=tokens, response_lengths=lengths, loss_masks=masks, rollout_log_probs=None)


def head_names(name: str) -> dict[str, str]:
    """The head's own weights, by what they are."""
    head = FAMILIES[name].head
    assert head is not None
    fields = ("token_norm", "hidden_norm", "projection", "final_norm")
    return {field: getattr(head, field).format(LAYERS) for field in fields}


def in_checkpoint(name: str, tensor: str) -> str:
    """The name of a tensor of the layer behind the last one, as checkpoints have it."""
    head = FAMILIES[name].head
    assert head is not None
    return tensor.replace(f"model.layers.{LAYERS}.", head.layer.format(LAYERS))


def write_model(work: Path, name: str) -> Path:
    """A model with a head, `work`; and beside it, in `work/whole`, the same layers as those of a deeper model."""
    own = tiny_config(name, **MODELS[name])
    deeper = own | {"num_hidden_layers": LAYERS + 1}
    if "layer_types" in own:
        deeper["layer_types"] = [*own["layer_types"], "full_attention"]
    whole = write_hf_model(work / "whole", deeper, seed=5)
    tensors = {
        in_checkpoint(name, each): tensor for each, tensor in load_file(whole / "model.safetensors").items()
    }
    size = deeper["hidden_size"]
    for field, each in head_names(name).items():
        shape = (size, 2 * size) if field == "projection" else (size,)
        tensors[each] = torch.randn(shape) * 0.1 + (0.0 if field == "projection" else 1.0)
    write_config(work, own)
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    return work


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    init_single_process()
    work = tmp_path_factory.mktemp("mtp")
    return {name: write_model(work / name, name) for name in MODELS}


def numbers(config: Config, work: Path) -> tuple[float | None, dict[str, Any]]:
    """The head's loss, on the last stage; and on rank 0 all gradients of an optimizer step by Hugging Face's names."""
    from rltrain.megatron.model.export import export_hf_weights
    from rltrain.megatron.training.forward_backward import forward_backward, token_loss
    from rltrain.megatron.training.share import RankShare

    actor = make_actor(config, work)
    share = RankShare(config, actor.shape, batch_with_shared_prompts())
    micro_batches = share.micro_batches(0, share.loss_inputs())
    sums = forward_backward(actor.policy.wrapped, micro_batches, token_loss(actor.shape, config))
    found = export_hf_weights(actor.policy.models, actor.shape, gradient_of)
    loss = float(sums["mtp_loss"]) if "mtp_loss" in sums else None
    return loss, {name: tensor.clone().numpy() for name, tensor in found}


def of_formula(directory: Path, name: str, work: Path) -> tuple[float, dict[str, Any]]:
    """The head's loss and gradients by the paper's formula, sample by sample."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    entries = as_transformers_knows(json.loads((directory / "whole" / "config.json").read_text()))
    known = CONFIG_MAPPING[entries["model_type"]].from_dict(entries)
    model = AutoModelForCausalLM.from_pretrained(directory / "whole", config=known, dtype=torch.float32)
    own = {
        field: load_file(directory / "model.safetensors")[each].requires_grad_()
        for field, each in head_names(name).items()
    }
    head, plus = FAMILIES[name].head, float(FAMILIES[name].zero_centered_norms)
    assert head is not None
    weights = {field: plus + each for field, each in own.items()}
    layers, eps = model.model.layers, entries["rms_norm_eps"]
    batch, total = batch_with_shared_prompts(), torch.zeros(())
    trainable = TrainableTokens.of(batch)
    for i, tokens in enumerate(batch.tokens):
        ids, predicted = torch.from_numpy(tokens.astype(np.int64)), trainable.positions[i] + 1
        further = predicted[predicted >= 2]
        if not len(further):
            continue
        model.model.layers, model.model.config.num_hidden_layers = layers[:LAYERS], LAYERS
        with torch.no_grad():
            hidden = model.model(ids[None]).last_hidden_state[:, :-2]
            embedded = model.model.embed_tokens(ids[None, 1:-1])
        parts = [norm(embedded, weights["token_norm"], eps), norm(hidden, weights["hidden_norm"], eps)]
        x = torch.cat(parts[::-1] if head.hidden_first else parts, -1) @ own["projection"].T
        places = torch.arange(len(ids) - 2)[None]
        angles = model.model.rotary_emb(x, places)
        x = layers[LAYERS](x, attention_mask=None, position_ids=places, position_embeddings=angles)
        x = x[0] if isinstance(x, tuple) else x
        logits = F.linear(norm(x, weights["final_norm"], eps), model.lm_head.weight.detach())[0]
        of_targets = F.cross_entropy(logits, ids[2:], reduction="none")
        weight = 1 / (len(predicted) * len(batch.tokens))
        total = total + weight * of_targets[torch.from_numpy(further - 2)].sum()
    (SCALE * total).backward()
    model.model.layers, model.model.config.num_hidden_layers = layers, LAYERS + 1
    with torch.no_grad():
        for weight in model.state_dict(keep_vars=True).values():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    model.save_pretrained(work)  # gives them the names of published weights
    deeper = load_file(work / "model.safetensors").items()
    gradients = {
        in_checkpoint(name, each): tensor.numpy()
        for each, tensor in deeper
        if each.startswith(f"model.layers.{LAYERS}.")
    }
    for field, each in head_names(name).items():
        assert own[field].grad is not None
        gradients[each] = own[field].grad.numpy()
    return float(total), gradients


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def after_steps(config: Config, work: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The metrics of two steps, and the weights after them."""
    from rltrain.megatron.model.export import export_hf_weights

    actor = make_actor(config, work)
    metrics = [actor.train(step, batch_with_shared_prompts()) for step in range(2)]
    found = export_hf_weights(actor.policy.models, actor.shape)
    return metrics, {name: tensor.clone().numpy() for name, tensor in found}


def gradients_or_steps(config: Config, work: Path) -> Any:
    """Gradients of data parallel ranks are shared out."""
    return (after_steps if config.parallel.use_distributed_optimizer else numbers)(config, work)


def all_layouts(configs: dict[str, Config], work: Path) -> dict[str, Any]:
    return in_each_layout(gradients_or_steps, configs, work)


@pytest.fixture(scope="module")
def on_two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    configs = {
        f"{name} {layout}": config_of(directory, actor_num_gpus_per_node=2, **changes)
        for name, directory in models.items()
        for layout, changes in LAYOUTS[name].items()
    }
    return run_ranks(all_layouts, configs, tmp_path_factory.mktemp("two"))


def check(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values, atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(
    name: str, models: dict[str, Path], on_two: list[dict[str, Any]], tmp_path: Path
) -> None:
    loss, expected = of_formula(models[name], name, tmp_path / "gradients")
    assert loss > 1 and all(np.abs(expected[each]).max() > 1e-4 for each in head_names(name).values())
    config = config_of(models[name])
    found, gradients = numbers(config, tmp_path / "own")
    assert found == pytest.approx(loss, abs=TOLERANCE)
    check(gradients, expected)
    # The model itself is trained as without the head, to the bit.
    _, without = numbers(config.replace(enable_mtp_training=False), tmp_path / "without")
    assert gradients.keys() == without.keys() | expected.keys()
    assert all(np.array_equal(gradients[each], values) for each, values in without.items())
    for layout, changes in LAYOUTS[name].items():
        ours, last = (each[f"{name} {layout}"] for each in on_two)
        if "use_distributed_optimizer" in changes:
            metrics, weights = after_steps(config, tmp_path / "steps")
            assert metrics[0]["train/mtp_loss"] == pytest.approx(loss, abs=TOLERANCE)
            assert metrics[1]["train/mtp_loss"] < loss
            assert ours[0] == last[0] == [pytest.approx(each, abs=TOLERANCE) for each in metrics]
            check(ours[1], weights)
        else:
            # Data parallel ranks would have a share of it each.
            assert last[0] == pytest.approx(loss, abs=TOLERANCE)
            check(ours[1], gradients)


def exported(directory: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


def test_checkpoints_exports_and_engines_get_what_was_trained(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from rltrain.tools.convert_hf_to_torch_dist import main as to_torch_dist
    from rltrain.tools.convert_torch_dist_to_hf import main as to_hf

    name = "MiMoForCausalLM"
    before, mine = exported(models[name]), set(of_head(name, models[name]))
    config = config_of(models[name], save=str(tmp_path / "saved"), lr=0.01)
    actor = make_actor(config, tmp_path / "run")
    actor.train(0, batch_with_shared_prompts())
    actor.save(0)
    actor.export(tmp_path / "hf")
    trained = exported(tmp_path / "hf")
    assert trained.keys() == before.keys()
    assert all((trained[each] - before[each]).abs().max() > 1e-4 for each in mine)
    rounds = actor._exporter.share(2**20, one_per_machine=False)
    sent = [(part.name, part.data) for parts in rounds for part in parts]
    streamed: list[Any] = []
    actor._exporter.stream(streamed.extend)
    for tensors in (sent, streamed):
        assert sorted(each for each, _ in tensors) == sorted(trained)
        assert all(torch.equal(trained[each], tensor) for each, tensor in tensors)
    # as a Hugging Face directory, and as a run that goes on
    to_hf(
        [
            f"--input-dir={tmp_path / 'saved'}",
            f"--origin-hf-dir={models[name]}",
            f"--output-dir={tmp_path / 'back'}",
        ]
    )
    back = exported(tmp_path / "back")
    assert back.keys() == trained.keys() and all(torch.equal(back[each], trained[each]) for each in back)
    again = make_actor(config, tmp_path / "again")
    assert again.start_rollout_id == 1
    expected, found = (each.train(1, batch_with_shared_prompts()) for each in (actor, again))
    assert found == expected and "train/mtp_loss" in found
    # one that has it and one that lacks it
    with pytest.raises(
        UserError, match="was trained with --enable-mtp-training, and this run does not use it"
    ):
        make_actor(config.replace(enable_mtp_training=False), tmp_path / "without")
    converted = to_torch_dist(
        [f"--hf-checkpoint={models[name]}", "--mtp-num-layers=1", f"--save={tmp_path / 'with'}"]
    )
    lacking = to_torch_dist([f"--hf-checkpoint={models[name]}", f"--save={tmp_path / 'lacking'}"])
    started = make_actor(
        config.replace(save=None, load=str(converted.parent), finetune=True), tmp_path / "started"
    )
    assert started.start_rollout_id == 0
    with pytest.raises(UserError, match="lacks the MTP layer"):
        make_actor(config.replace(save=None, load=str(lacking.parent), finetune=True), tmp_path / "lacks")
    # a reference never computes it
    compared = {"save": None, "finetune": True, "loss_type": "policy_loss", "use_kl_loss": True}
    for own, other, is_trained in ((converted, lacking, True), (lacking, converted, False)):
        settings = {**compared, "load": str(own.parent), "ref_load": str(other.parent)}
        against = config.replace(**settings, enable_mtp_training=is_trained)
        assert make_actor(against, tmp_path / f"reference-{is_trained}").start_rollout_id == 0


def of_head(name: str, directory: Path) -> list[str]:
    head = FAMILIES[name].head
    assert head is not None
    layer = head.layer.format(LAYERS)
    return [
        each for each in exported(directory) if each.startswith(layer) or each in head_names(name).values()
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--mtp-num-layers", "1"],
            "--mtp-num-layers 1: without --enable-mtp-training MTP layers are not trained",
        ),
        (["--enable-mtp-training", "--mtp-num-layers", "2"], "one layer can be trained"),
        (["--enable-mtp-training", "--mtp-loss-scaling-factor", "0"], "must be above 0"),
        (["--enable-mtp-training", "--lora-rank", "4"], "does not go with --lora-rank 4"),
        (["--enable-mtp-training", "--ckpt-format", "torch"], "does not go with --ckpt-format torch"),
    ],
)
def test_what_would_do_nothing_is_refused(given: list[str], words: str, models: dict[str, Path]) -> None:
    from rltrain import arguments

    needed = ["--prompt-data", "p", "--rollout-batch-size", "8", "--num-rollout", "4"]
    with pytest.raises(UserError, match=words):
        arguments.parse(["--hf-checkpoint", str(models["MiMoForCausalLM"]), *needed, *given])


def test_models_that_have_none_are_named(models: dict[str, Path], tmp_path: Path) -> None:
    from rltrain.arguments.model_flags import check_mtp

    model = models["MiMoForCausalLM"]
    mtp = config_of(model).mtp
    check_mtp(json.loads((model / "config.json").read_text()), mtp, str(model))
    with pytest.raises(
        UserError, match=r"Qwen3ForCausalLM does not support it. Supported: .*MiMoForCausalLM"
    ):
        check_mtp(tiny_config(), mtp, str(model))
    two = tiny_config("MiMoForCausalLM", num_nextn_predict_layers=2)
    with pytest.raises(UserError, match="num_nextn_predict_layers 2"):
        check_mtp(two, mtp, str(model))


def test_weights_that_lack_the_layer_are_refused_before_the_start(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from rltrain.inputs import check_inputs

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1 = ", "label": "2"}\n' * 8)
    directory = models["MiMoForCausalLM"]
    config = config_of(
        directory, prompt_data=str(tmp_path / "prompts.jsonl"), debug_train_only=True, input_key="prompt"
    )
    check_inputs(config)
    with pytest.raises(
        UserError, match=r"no tensor model.mtp_layers.0.input_proj.weight: its weights lack the MTP layer"
    ):
        check_inputs(config.replace(hf_checkpoint=str(directory / "whole")))
