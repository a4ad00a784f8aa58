"""Converters: Hugging Face → torch_dist → Hugging Face gives the same bits, and a run can start in between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import init_single_process, make_actor, make_args, tiny_config, write_hf_model

from rltrain.arguments.errors import UserError
from rltrain.tools import convert_hf_to_torch_dist, convert_torch_dist_to_hf

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "glm4": tiny_config("Glm4ForCausalLM", pad_token_id=None),
    "tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    "experts": tiny_config(
        "Qwen3MoeForCausalLM",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[],
    ),
}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: each for file in directory.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_gives_the_same_bits(tmp_path: Path, model: str) -> None:
    init_single_process()
    origin = write_hf_model(tmp_path / "origin", MODELS[model])
    checkpoint = convert_hf_to_torch_dist.main(
        ["--hf-checkpoint", str(origin), "--num-layers", "2", "--swiglu", "--save", str(tmp_path / "dist")]
    )
    assert checkpoint == tmp_path / "dist" / "release"
    back = convert_torch_dist_to_hf.main(
        ["--input-dir", str(tmp_path / "dist"), "--output-dir", str(tmp_path / "back"),
         "--origin-hf-dir", str(origin), "--chunk-size", "20000"]
    )  # fmt: skip
    ours, theirs = tensors(back), tensors(origin)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )
    assert len(list(back.glob("*.safetensors"))) > 1  # --chunk-size

    other = write_hf_model(tmp_path / "other", MODELS[model], seed=3)
    loaded = make_actor(make_args(other, load=str(tmp_path / "dist")), tmp_path)
    direct = make_actor(make_args(origin), tmp_path)
    assert loaded.start_rollout_id == 0
    for ours_, theirs_ in zip(loaded.models[0].parameters(), direct.models[0].parameters(), strict=True):
        assert torch.equal(ours_, theirs_)


def test_a_checkpoint_without_our_manifest_is_read_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    init_single_process()
    origin = write_hf_model(tmp_path / "origin", MODELS["tied"])
    release = convert_hf_to_torch_dist.main(
        ["--hf-checkpoint", str(origin), "--save", str(tmp_path / "dist")]
    )
    (release / "manifest.json").unlink()  # as Megatron-LM and slime write them
    flags = ["--input-dir", str(release), "--origin-hf-dir", str(origin)]
    back = convert_torch_dist_to_hf.main([*flags, "--output-dir", str(tmp_path / "back")])
    assert tensors(back).keys() == tensors(origin).keys()
    with pytest.raises(UserError, match=r"exists already: give --force"):
        convert_torch_dist_to_hf.main([*flags, "--output-dir", str(tmp_path / "back")])
    shard = next(release.glob("*.distcp"))
    shutil.move(shard, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        convert_torch_dist_to_hf.main([*flags, "--output-dir", str(tmp_path / "again")])


def test_bad_input_is_refused(tmp_path: Path) -> None:
    init_single_process()
    origin = write_hf_model(tmp_path / "origin", MODELS["tied"])
    with pytest.raises(UserError, match="contradicts"):
        convert_hf_to_torch_dist.main(
            ["--hf-checkpoint", str(origin), "--save", str(tmp_path / "x"), "--num-layers", "3"]
        )
    with pytest.raises(UserError, match="no complete checkpoint"):
        convert_torch_dist_to_hf.main(
            ["--input-dir", str(tmp_path / "x"), "--output-dir", str(tmp_path / "y"), "--origin-hf-dir", str(origin)]
        )  # fmt: skip
