"""Model recipes against the models' published `config.json`; shape flags against the model that they come with."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import tiny_config, tiny_experts_config
from helpers.run_files import LEAST

from hpc.planning.job_plan import make_slurm_plan
from hpc.planning.nodes import make_ask, read_cluster_flags, split_nodes
from rltrain import arguments
from rltrain.arguments import UserError, flags
from rltrain.arguments.hf_config import read_model_shape
from rltrain.arguments.model_flags import check_model_flags, layer_pattern, megatron_shape, moe_layers
from rltrain.arguments.recipes import builtin_recipes, read_recipe

# `found_in`: public repositories, and the files in them, that have these values.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "published_configs.json").read_text()
)
KNOWN = [option.removeprefix("--") for option in arguments.known_flags()]


def parse(*more: str) -> Any:
    return arguments.parse([*LEAST, *more])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_the_published_config_says(name: str) -> None:
    recipe = read_recipe(name, KNOWN)
    check_model_flags(parse(*flags.to_argv(recipe)).shape, PUBLISHED[name], "/m")
    # nothing that the model has is left unsaid, so that another model is told apart by any of it
    said = {
        flag for flag, (value, _) in megatron_shape(PUBLISHED[name]).items() if value not in (None, False)
    }
    neutral = {"moe-router-num-groups", "moe-router-group-topk", "moe-router-topk-scaling-factor"}
    implied = {flag for flag in neutral & said if megatron_shape(PUBLISHED[name])[flag][0] == 1}
    implied |= {"position-embedding-type", "rotary-percent", "attention-dropout", "hidden-dropout"}
    assert said - implied <= recipe.keys()


def test_every_model_has_a_published_config() -> None:
    demos = {"demo", "demo-sft"}
    assert set(builtin_recipes()) - demos >= PUBLISHED.keys()
    models = Path(arguments.__file__).parents[1] / "models"
    assert {path.name.removesuffix(".toml") for path in models.glob("*.toml")} == PUBLISHED.keys()
    assert all(config["found_in"] for config in PUBLISHED.values())


def test_the_launch_script_of_a_glm4_parses_unchanged() -> None:
    script = """--spec slime_plugins.models.glm4 get_glm_spec --swiglu --num-layers 40 --hidden-size 4096
        --ffn-hidden-size 13696 --num-attention-heads 32 --group-query-attention --num-query-groups 2
        --use-rotary-position-embeddings --disable-bias-linear --add-qkv-bias --normalization RMSNorm
        --norm-epsilon 1e-5 --rotary-base 10000 --vocab-size 151552 --post-self-attn-layernorm --post-mlp-layernorm
        --rotary-interleaved --rotary-percent 0.5 --no-rope-fusion --untie-embeddings-and-output-weights"""
    args = parse(*script.split())
    check_model_flags(args.shape, PUBLISHED["glm4-9B"], "/m")
    assert args.ignored_flags == ["spec"]
    with pytest.raises(UserError, match=r"--rotary-percent 1\.0 .* partial_rotary_factor makes it 0\.5"):
        check_model_flags(parse("--rotary-percent", "1").shape, PUBLISHED["glm4-9B"], "/m")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_launch_script_that_sources_its_model_parses_and_plans(name: str, tmp_path: Path) -> None:
    words = flags.to_argv(read_recipe(name, KNOWN))
    # One argument a line, its values behind it.
    lines = "".join(("\n   " if word.startswith("--") else " ") + shlex.quote(word) for word in words)
    (tmp_path / f"{name}.sh").write_text(f"MODEL_ARGS=({lines}\n)\n")
    script = Path(__file__).parents[1] / "launch_scripts" / "any_model.sh"
    done = subprocess.run(["bash", script, tmp_path, name], capture_output=True, check=True)
    args = arguments.parse(done.stdout.decode().split("\0")[:-1])
    check_model_flags(args.shape, PUBLISHED[name], "/m")
    assert args.functions.dynamic_sampling_filter_path == "rltrain.rollout.filters.check_reward_nonzero_std"
    split = split_nodes(make_ask(read_cluster_flags({"colocate": []}), 1, None), 8, 8)
    roles = Counter(process.role for process in make_slurm_plan(args.engines, args.debug, split).processes)
    assert roles == {"router": 1, "engine": 4, "rollout": 1, "trainer": 1}  # the trainer's ranks are one step


@pytest.mark.parametrize("name", ["qwen3-4B", "qwen2.5-7B", "llama3.2-1B", "qwen3-30B-A3B"])
def test_a_recipe_does_not_fit_another_model(name: str) -> None:
    args = parse(*flags.to_argv(read_recipe(name, KNOWN)))
    for other, config in PUBLISHED.items():
        if other != name:
            with pytest.raises(UserError, match=r"contradicts /m/config\.json"):
                check_model_flags(args.shape, config, "/m")


def test_a_contradiction_shows_both_values_and_both_sources() -> None:
    with pytest.raises(UserError) as caught:
        check_model_flags(
            parse("--num-layers", "28").shape, PUBLISHED["qwen3-4B"], "/m", {"num-layers": "recipe @mine"}
        )
    for part in ("--num-layers 28 (recipe @mine)", "/m/config.json", "num_hidden_layers makes it 36"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"--untie-embeddings-and-output-weights .*tie_word_embeddings"):
        check_model_flags(parse("--untie-embeddings-and-output-weights").shape, PUBLISHED["qwen3-4B"], "/m")
    with pytest.raises(UserError, match=r"--attention-dropout 0.1 \(flag\): engines have no dropout"):
        check_model_flags(parse("--attention-dropout", "0.1").shape, PUBLISHED["qwen3-4B"], "/m")
    check_model_flags(parse().shape, PUBLISHED["qwen3-4B"], "/m")


def test_layers_with_experts() -> None:
    assert layer_pattern("2", 4) == [1, 0, 1, 0]
    assert layer_pattern("([0]*1+[1]*3)", 4) == layer_pattern("[0,1,1,1]", 4) == [0, 1, 1, 1]
    with pytest.raises(UserError, match="--moe-layer-freq"):
        layer_pattern("__import__('os')", 4)
    every_other = tiny_experts_config() | {"decoder_sparse_step": 2}
    assert moe_layers(read_model_shape(every_other)) == [0, 0, 0, 1]


def test_one_expert_that_weighs_one() -> None:
    with pytest.raises(UserError, match="num_experts_per_tok 1 with norm_topk_prob"):
        read_model_shape(tiny_experts_config() | {"num_experts_per_tok": 1})
    assert read_model_shape(
        tiny_experts_config() | {"num_experts_per_tok": 1, "norm_topk_prob": False}
    ).experts


def test_routers_that_megatron_has_not() -> None:
    glm = tiny_config(
        "Glm4MoeForCausalLM", n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2
    )
    experts = read_model_shape(glm).experts
    assert experts and (experts.groups, experts.groups_taken, experts.scale, experts.shared_size) == (
        4,
        2,
        1,
        1408,
    )
    whole = read_model_shape(glm | {"n_group": 2}).experts  # both groups are taken: no group counts
    assert whole and whole.groups == 1
    for change, message in (
        ({"num_experts_per_tok": 3}, "n_group 4 and topk_group 2 .* only two per group"),
        ({"n_group": 3}, "groups must divide the experts"),
        ({"norm_topk_prob": False}, "norm_topk_prob to false"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor 0: it must be a number above 0"),
        ({"n_shared_experts": 0}, "n_shared_experts 0"),
    ):
        with pytest.raises(UserError, match=message):
            read_model_shape(glm | change)


def test_the_launch_script_of_a_moonlight_parses_unchanged() -> None:
    script = """--disable-bias-linear --num-layers 27 --hidden-size 2048 --ffn-hidden-size 11264
        --num-attention-heads 16 --kv-channels 128 --normalization RMSNorm --position-embedding-type rope
        --norm-epsilon 1e-5 --rotary-percent 1.0 --swiglu
        --untie-embeddings-and-output-weights --no-masked-softmax-fusion --vocab-size 163840
        --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
        --qk-layernorm --rotary-scaling-factor 1 --rotary-base 50000 --mscale 1.0 --mscale-all-dim 1.0
        --attention-softmax-in-fp32 --no-rope-fusion --num-experts 64 --moe-layer-freq [0]*1+[1]*26
        --moe-ffn-hidden-size 1408 --moe-router-topk 6 --moe-shared-expert-intermediate-size 2816
        --moe-router-pre-softmax --moe-router-score-function sigmoid --moe-router-enable-expert-bias
        --moe-router-load-balancing-type seq_aux_loss --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0
        --moe-router-bias-update-rate 0 --moe-router-group-topk 1 --moe-router-num-groups 1 --moe-grouped-gemm
        --moe-router-topk-scaling-factor 2.446 --moe-token-drop-policy probs --moe-router-dtype fp32
        --moe-permute-fusion"""
    args = parse(*script.split())
    check_model_flags(args.shape, PUBLISHED["moonlight"], "/m")
    for change, message in (
        (["--moe-router-num-groups", "8"], "n_group makes it 1"),
        (["--rotary-scaling-factor", "40"], r"rope_scaling\.factor makes it 1\.0"),
        (["--q-lora-rank", "1536"], "q_lora_rank makes it None"),
    ):
        with pytest.raises(UserError, match=message):
            check_model_flags(parse(*script.split(), *change).shape, PUBLISHED["moonlight"], "/m")
