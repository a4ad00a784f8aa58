"""Converters: Hugging Face → torch_dist → Hugging Face gives the same bits, and a run can start in between."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_config,
    tiny_config,
    tiny_experts_config,
    write_hf_model,
)

from rltrain.run.errors import UserError
from rltrain.tools import convert_hf_to_torch_dist, convert_torch_dist_to_hf
from rltrain.tools.conversion import model_args

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "glm4": tiny_config("Glm4ForCausalLM", pad_token_id=None),
    "tied": tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    "experts": tiny_experts_config(num_hidden_layers=2, mlp_only_layers=[]),
}


@pytest.fixture(autouse=True)
def _environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


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
    loaded = make_actor(make_config(other, load=str(tmp_path / "dist")), tmp_path)
    direct = make_actor(make_config(origin), tmp_path)
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


def test_what_others_may_have_written_is_not_unpickled(tmp_path: Path) -> None:
    init_single_process()
    origin = write_hf_model(tmp_path / "origin", MODELS["tied"])
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # TMPDIR may lie where nobody else comes
        Path(name).chmod(0o755)  # pytest's own directories are nobody else's
        release = convert_hf_to_torch_dist.main(["--hf-checkpoint", str(origin), "--save", f"{name}/dist"])
        (release / "common.pt").chmod(0o646)
        (release.parent / "config.json").write_text("{}")  # what lies beside it makes it no safer
        flags = ["--origin-hf-dir", str(origin), "--output-dir", str(tmp_path / "back")]
        for named in (release, release.parent):
            with pytest.raises(UserError, match=r"common.pt is writable by everybody.*--trust-load.*chmod"):
                convert_torch_dist_to_hf.main(["--input-dir", str(named), *flags])
        convert_torch_dist_to_hf.main(["--input-dir", str(named), *flags, "--trust-load"])
    assert tensors(tmp_path / "back").keys() == tensors(origin).keys()


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


def test_no_gpu_is_used(tmp_path: Path) -> None:
    """A large model need not fit on one."""
    init_single_process()
    origin = write_hf_model(tmp_path / "origin", MODELS["tied"])
    argv = ["--hf-checkpoint", str(origin), "--save", str(tmp_path / "dist"), "--distributed-backend", "nccl"]
    assert model_args(argv, origin).parallel.distributed_backend == "gloo"
    convert_hf_to_torch_dist.main(argv)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


class LikeTransformerEngine:
    """Has attention keep `_extra_state` as TransformerEngine's does, in a stand-in of three bytes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from rltrain.megatron.model.attention import PackedAttention

        self.got: list[Any] = []
        extra = torch.tensor([1, 2, 3], dtype=torch.uint8)
        patch.setattr(PackedAttention, "get_extra_state", lambda layer: extra)
        patch.setattr(PackedAttention, "set_extra_state", lambda layer, state: self.got.append(state))


@pytest.mark.parametrize("saved_with", [False, True], ids=["saved without", "saved with"])
@pytest.mark.parametrize("format_", ["torch_dist", "torch"])
def test_checkpoints_go_between_layers_with_and_without_extra_state(
    tmp_path: Path, saved_with: bool, format_: str
) -> None:
    init_single_process()
    model = write_hf_model(tmp_path / "model", tiny_config())

    def actor(with_extra_state: bool, **flags: Any) -> tuple[Any, list[Any]]:
        with pytest.MonkeyPatch.context() as patch:
            got = LikeTransformerEngine(patch).got if with_extra_state else []
            made = make_actor(make_config(model, ckpt_format=format_, **flags), tmp_path)
            if "save" in flags:
                made.save(0)
            return made, got

    first, _ = actor(saved_with, save=str(tmp_path / "checkpoints"), no_save_optim=True)
    second, got = actor(not saved_with, load=str(tmp_path / "checkpoints"))
    assert not any(isinstance(each, torch.Tensor) for each in got)
    for ours, theirs in zip(first.models[0].parameters(), second.models[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
