"""Weights for quantised engines: block FP8 against NumPy, what is exported, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    write_config,
    write_hf_model,
)
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments.model_flags import check_quantised
from rltrain.megatron.quantise import quantise
from rltrain.weights.buckets import Part, lay_out, write
from rltrain.weights.delta import apply, change

FORM = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}
BASE = ["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "1", "--num-rollout", "1"]


def e4m3() -> NDArray[np.float64]:
    """The number that each byte is: a sign, four bits of an exponent, three of a mantissa; NaN where all are set."""
    byte = np.arange(256)
    sign, exponent, mantissa = np.where(byte & 128, -1.0, 1.0), (byte >> 3) & 15, (byte & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    return np.where(byte & 127 == 127, np.nan, sign * values)


def decode(values: torch.Tensor) -> NDArray[np.float64]:
    return e4m3()[values.view(torch.uint8).numpy()]


def spread(scales: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The scale of each element."""
    each = np.kron(scales.double().numpy(), np.ones(block))
    return each[: shape[0], : shape[1]]


def test_every_value_is_the_nearest_that_there_is() -> None:
    block = (32, 64)
    weight = torch.randn(70, 100, generator=torch.Generator().manual_seed(0))
    weight[:32] *= 1e-6
    weight[32:64, :64] = 0
    values, scales = quantise(weight.bfloat16(), block)
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (3, 2)
    exact = weight.bfloat16().double().numpy() / spread(scales, block, (70, 100))
    numbers = e4m3()[np.isfinite(e4m3())]
    nearest = np.abs(exact[..., None] - numbers).min(axis=-1)
    np.testing.assert_allclose(np.abs(exact - decode(values)), nearest, atol=1e-4)
    assert (np.abs(decode(values)).reshape(-1).max(), np.abs(exact).max()) == pytest.approx((448, 448))
    assert (decode(values)[32:64, :64] == 0).all()


def test_a_bucket_brings_it_as_it_is() -> None:
    values, scales = quantise(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), (4, 4))
    parts = [Part.whole("w", values), Part.whole("s", scales)]
    pieces = lay_out(parts)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(parts, pieces, buffer)
    assert torch.equal(pieces[0].of(buffer).view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(pieces[1].of(buffer), scales)


def test_what_has_changed_of_it_is_enough() -> None:
    before = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    after = before.clone()
    after[::100] = torch.tensor(2.0).to(torch.float8_e4m3fn)
    part = change("w", before, after)
    assert part is not None and part.changed is not None and part.data.nbytes < 100
    (piece,) = lay_out([part])
    buffer = torch.zeros(piece.end, dtype=torch.uint8)
    write([part], [piece], buffer)
    apply(piece, buffer, before)
    assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


def quantised_directory(directory: Path, plain: Path) -> Path:
    """Another model in block FP8: all weights of attention and MLP, but not those of the first layer's MLP."""
    tensors = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(plain / "model.safetensors").items()
    }
    for name in [name for name in tensors if name.endswith("proj.weight") and "layers.0.mlp" not in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name], (16, 24))
    write_config(directory, tiny_config(quantization_config=FORM))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.slow
def test_engines_get_the_trainers_weights_in_the_form_of_their_directory(tmp_path: Path) -> None:
    init_single_process()
    plain = write_hf_model(tmp_path / "plain", tiny_config())
    quantised = quantised_directory(tmp_path / "quantised", plain)
    wanted = load_file(quantised / "model.safetensors")
    actor = make_actor(make_config(quantised, ref_load=str(plain)), tmp_path)
    assert np.isfinite(actor.train(0, make_batch(8))["train/loss"])
    reference = make_actor(make_config(plain), tmp_path)
    reference.train(0, make_batch(8))
    for name, each in (("given", actor), ("trained", reference)):
        each.export(tmp_path / name)
    given, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "trained"))
    assert {name: (each.dtype, each.shape) for name, each in given.items()} == {
        name: (each.dtype, each.shape) for name, each in wanted.items()
    }
    for name, tensor in trained.items():
        if f"{name}_scale_inv" not in given:
            assert torch.equal(given[name], tensor)
            continue
        scale = spread(given[f"{name}_scale_inv"], (16, 24), tuple(tensor.shape))
        difference = np.abs(decode(given[name]) * scale - tensor.double().numpy())
        # Half of the last of four binary digits; below the smallest exponent, half of the smallest number.
        assert (difference <= np.maximum(tensor.abs().double().numpy() / 16, scale * 2.0**-10) * 1.001).all()
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    assert config["quantization_config"] == FORM and config["dtype"] == "float32"
    shared = {
        part.name: part.data for parts in actor._exporter.share(2000, one_per_machine=False) for part in parts
    }
    assert shared.keys() == given.keys()
    assert all(
        torch.equal(tensor.view(torch.uint8), given[name].view(torch.uint8))
        for name, tensor in shared.items()
    )


@pytest.mark.slow
def test_quantised_weights_are_not_trained(tmp_path: Path) -> None:
    init_single_process()
    plain = write_hf_model(tmp_path / "plain", tiny_config())
    quantised = quantised_directory(tmp_path / "quantised", plain)
    with pytest.raises(UserError, match=r"quantised weights can't be trained.*--ref-load"):
        make_actor(make_config(quantised), tmp_path)
    with pytest.raises(UserError, match="quantised has quantised weights, which can't be trained"):
        make_actor(make_config(quantised, ref_load=str(quantised)), tmp_path)


INT8 = ["--sglang-quantization", "w8a8_int8"]
FP8 = ["--sglang-quantization", "fp8"]
FLASH = [*FP8, "--sglang-load-format", "flash_rl"]


@pytest.mark.parametrize(
    ("flags", "config", "reason"),
    [
        ([], {"quantization_config": FORM}, "Only engines can use them: .*--ref-load"),
        (["--ref-load", "r"], {"quantization_config": FORM}, None),
        (["--ref-load", "r", *FP8], {"quantization_config": FORM}, None),
        (["--ref-load", "r", *INT8], {"quantization_config": FORM}, "can't load the trainer's weights into them"),
        (["--ref-load", "r"], {"quantization_config": {"quant_method": "awq"}}, "only block FP8"),
        (["--ref-load", "r"], {"quantization_config": FORM | {"scale_fmt": "ue8m0"}}, "without scale_fmt"),
        (INT8, {}, "--sglang-quantization w8a8_int8: SGLang repacks"),
        (FP8, {}, "--sglang-quantization fp8: SGLang repacks"),
        (FLASH, {}, None),
        ([*FLASH, "--random-init"], {}, "weights from a directory"),
        (FLASH, {"architectures": ["LlamaForCausalLM"]}, "this is LlamaForCausalLM"),
        ([*INT8, "--debug-rollout-only"], {"quantization_config": FORM}, None),
    ],
)  # fmt: skip
def test_engines_that_cannot_be_given_weights(
    flags: list[str], config: dict[str, Any], reason: str | None
) -> None:
    hf_config, parsed = tiny_config(**config), arguments.parse([*BASE, *flags])
    if reason is None:
        check_quantised(hf_config, parsed)
        return
    with pytest.raises(UserError, match=reason):
        check_quantised(hf_config, parsed)
