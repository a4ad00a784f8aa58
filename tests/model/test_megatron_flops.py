"""The estimate of arithmetic against what torch counts in transformers' forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import tiny_config, write_hf_model
from torch.utils.flop_counter import FlopCounterMode

from rltrain.arguments.hf_config import read_model_shape
from rltrain.megatron.device import peak_flops_of
from rltrain.megatron.training.flops import sequence_flops

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}


@pytest.mark.parametrize("config", [tiny_config(), tiny_config("Qwen3MoeForCausalLM", **EXPERTS)])
def test_flops(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = 24
    directory = write_hf_model(tmp_path, config)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if "Moe" in config["architectures"][0]:
        options["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros((1, tokens), dtype=torch.int64))
    # transformers computes the whole square of attention, and the angles of its rotary embeddings.
    heads, layers = 4 * 8, 2
    square = 2 * tokens * layers * heads * tokens
    angles = 2 * 4 * tokens
    assert sequence_flops(read_model_shape(config), tokens, tokens) + square == pytest.approx(
        counter.get_total_flops() - angles, rel=1e-3
    )


def test_a_window_saves_what_it_hides() -> None:
    whole = tiny_config("MistralForCausalLM", sliding_window=None)
    windowed = whole | {"sliding_window": 8}
    flops = [sequence_flops(read_model_shape(config), 24, 24) for config in (whole, windowed)]
    # Of 24 × 24 / 2 pairs those of the first 16 × 16 / 2 are hidden; two matrices, two operations each.
    assert flops[0] - flops[1] == 2 * 2 * 4 * 8 * 16 * 16 / 2 * 2


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_a_card_has_less_than_the_module_of_its_chip(name: str, tera: float | None) -> None:
    """From NVIDIA's data sheets, dense."""
    assert peak_flops_of(name) == (None if tera is None else tera * 1e12)
