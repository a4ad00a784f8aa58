"""Model recipes against the models' published `config.json`; shape flags against the model that they come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rltrain import arguments
from rltrain.arguments import UserError, flags
from rltrain.arguments.model_flags import check_model_flags, layer_pattern, megatron_shape, moe_layers
from rltrain.arguments.recipes import builtin_recipes, read_recipe

# `found_in`: public repositories, and the files in them, that have these values.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text()
)
BASE = [
    "--hf-checkpoint",
    "/m",
    "--prompt-data",
    "p.jsonl",
    "--rollout-batch-size",
    "4",
    "--num-rollout",
    "3",
]
KNOWN = [option.removeprefix("--") for option in arguments.known_flags()]


def parse(*more: str) -> Any:
    return arguments.parse([*BASE, *more])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_the_published_config_says(name: str) -> None:
    recipe = read_recipe(name, KNOWN)
    check_model_flags(parse(*flags.to_argv(recipe)), PUBLISHED[name])
    # nothing that the model has is left unsaid, so that another model is told apart by any of it
    said = {
        flag for flag, (value, _) in megatron_shape(PUBLISHED[name]).items() if value not in (None, False)
    }
    implied = {"position-embedding-type", "rotary-percent", "attention-dropout", "hidden-dropout"}
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
    check_model_flags(args, PUBLISHED["glm4-9B"])
    assert args.ignored_flags == ["spec"]
    with pytest.raises(UserError, match=r"--rotary-percent 1\.0 .* partial_rotary_factor makes it 0\.5"):
        check_model_flags(parse("--rotary-percent", "1"), PUBLISHED["glm4-9B"])


@pytest.mark.parametrize("name", ["qwen3-4B", "qwen2.5-7B", "llama3.2-1B", "qwen3-30B-A3B"])
def test_a_recipe_does_not_fit_another_model(name: str) -> None:
    args = parse(*flags.to_argv(read_recipe(name, KNOWN)))
    for other, config in PUBLISHED.items():
        if other != name:
            with pytest.raises(UserError, match=r"contradicts /m/config\.json"):
                check_model_flags(args, config)


def test_a_contradiction_shows_both_values_and_both_sources() -> None:
    with pytest.raises(UserError) as caught:
        check_model_flags(parse("--num-layers", "28"), PUBLISHED["qwen3-4B"], {"num-layers": "recipe @mine"})
    for part in ("--num-layers 28 (recipe @mine)", "/m/config.json", "num_hidden_layers makes it 36"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"--untie-embeddings-and-output-weights .*tie_word_embeddings"):
        check_model_flags(parse("--untie-embeddings-and-output-weights"), PUBLISHED["qwen3-4B"])
    with pytest.raises(UserError, match=r"--attention-dropout 0.1 \(flag\): engines have no dropout"):
        check_model_flags(parse("--attention-dropout", "0.1"), PUBLISHED["qwen3-4B"])
    check_model_flags(parse(), PUBLISHED["qwen3-4B"])


def test_layers_with_experts() -> None:
    assert layer_pattern("2", 4) == [1, 0, 1, 0]
    assert layer_pattern("([0]*1+[1]*3)", 4) == layer_pattern("[0,1,1,1]", 4) == [0, 1, 1, 1]
    with pytest.raises(UserError, match="--moe-layer-freq"):
        layer_pattern("__import__('os')", 4)
    every_other = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert moe_layers(every_other) == [0, 0, 0, 1]
