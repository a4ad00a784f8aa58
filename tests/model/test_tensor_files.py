"""Directories whose weights are not what their config.json, or their name, promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.megatron import init_single_process, make_config, tiny_config, write_hf_model
from safetensors.torch import load_file, save_file

from rltrain.models.directory import read_hf_config
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    init_single_process()
    return load_file(write_hf_model(tmp_path_factory.mktemp("original"), tiny_config()) / "model.safetensors")


def load(directory: Path) -> None:
    from rltrain.megatron.device import megatron_scope
    from rltrain.megatron.model.build import build_model, read_shape
    from rltrain.megatron.model.load import load_hf_weights

    config = make_config(directory)
    shape = read_shape(config)
    with megatron_scope():
        load_hf_weights(build_model(shape, config), shape, directory)


def write(directory: Path, tensors: Tensors, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny_config(**changes)))
    save_file(tensors, directory / "model.safetensors")
    return directory


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, object], str]] = {
    "unused": (lambda t: t | {f"{FIRST}.bias": torch.ones(32)}, {}, rf"does not use: {FIRST}\.bias"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, {}, "no tensor lm_head.weight"),
    "transposed": (lambda t: t | {f"{FIRST}.weight": torch.ones(16, 64)}, {}, r"\(16, 64\), but .* \(32, 32\)"),
    "few rows": (
        lambda t: t | {"model.embed_tokens.weight": torch.ones(60, 32)},
        {},
        r"\(60, 32\), but config.json asks for \(61, 32\)",
    ),
    "more rows": (lambda t: t, {"vocab_size": 60}, r"\(61, 32\), but config.json asks for \(60, 32\)"),
    "int8": (lambda t: t | {f"{FIRST}.weight": torch.ones(32, 32, dtype=torch.int8)}, {}, "quantised .I8."),
    "fp8": (
        lambda t: t | {f"{FIRST}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)},
        {},
        "quantised .F8_E4M3.",
    ),
    "tied": (lambda t: t, {"tie_word_embeddings": True}, "lm_head.weight is not its model.embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_weights_of_another_model_are_refused(name: str, original: Tensors, tmp_path: Path) -> None:
    change, config, message = CHANGES[name]
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "model", change(original), **config))


def test_weights_that_say_the_same_twice_are_loaded(original: Tensors, tmp_path: Path) -> None:
    twice = original | {"lm_head.weight": original["model.embed_tokens.weight"].clone()}
    twice["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    load(write(tmp_path / "model", twice, tie_word_embeddings=True))


def test_an_index_beside_one_file(original: Tensors, tmp_path: Path) -> None:
    directory = write(tmp_path / "model", original)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(original, "model.safetensors")}))
    load(directory)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(original, "model-00001-of-00001.safetensors")}))
    with pytest.raises(UserError, match="Remove the one that is out of date"):
        load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00001-of-00001\.safetensors, which its"):
        load(directory)
    index.write_text("[]")
    with pytest.raises(UserError, match="not an index"):
        load(directory)
    index.unlink()
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="not a safetensors file"):
        load(directory)
    whole = (write(tmp_path / "again", original) / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(directory)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "pickled"),
        ("model-q4_k_m.gguf", "GGUF"),
        ("adapter_model.safetensors", "no model.*safetensors in it"),
    ],
)
def test_other_kinds_of_weights(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter: merge it"):
        read_hf_config(tmp_path)
