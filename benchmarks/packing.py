"""Packing and balance: how full micro-batches and how even ranks are, and time, for lognormal lengths at cap 8192.

python benchmarks/packing.py
"""

from __future__ import annotations

import math
import statistics
import time

import numpy as np

from rltrain.arguments.hf_config import read_model_shape
from rltrain.data.packing import pack, plan_step
from rltrain.megatron.flops import sequence_flops

CAPACITY = 8192
REPEATS = 30
SHAPE = read_model_shape(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
)


def lengths(seed: int, count: int = 1024) -> list[int]:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(6.5, 0.9, count), 16, CAPACITY).astype(int).tolist()


def main() -> None:
    ratios, milliseconds = [], []
    for seed in range(REPEATS):
        sample = lengths(seed)
        start = time.perf_counter()
        bins = pack(sample, CAPACITY)
        milliseconds.append((time.perf_counter() - start) * 1e3)
        ratios.append(math.ceil(sum(sample) / CAPACITY) / len(bins))
    print(
        f"packing: lower bound / micro-batches = {statistics.mean(ratios):.4f} (worst {min(ratios):.4f}),"
        f" {statistics.median(milliseconds):.2f} ms for 1024 sequences (aim: 0.996 in 1 ms)"
    )
    for count in (1024, 4096):
        balance(count, ranks=32, by_flops=False)
        balance(count, ranks=32, by_flops=True)


def balance(count: int, *, ranks: int, by_flops: bool) -> None:
    """How even the ranks of a plan are, against sequences dealt out in turn."""
    fullest, in_turn, milliseconds = [], [], []
    for seed in range(REPEATS):
        sample = lengths(seed, count)
        costs = [cost(length) for length in sample] if by_flops else [float(length) for length in sample]
        start = time.perf_counter()
        plan = plan_step(sample, ranks, max_tokens=CAPACITY, costs=costs)
        milliseconds.append((time.perf_counter() - start) * 1e3)
        mean = max(sum(costs) / ranks, max(costs))  # no plan can be better than its longest sequence
        fullest.append(max(sum(costs[i] for b in rank for i in b) for rank in plan.micro_batches) / mean)
        in_turn.append(max(sum(costs[rank::ranks]) for rank in range(ranks)) / mean)
    print(
        f"balance of {count} sequences over {ranks} ranks by {'flops' if by_flops else 'tokens'}: fullest rank /"
        f" bound = {statistics.mean(fullest):.4f} (worst {max(fullest):.4f}; dealt in turn"
        f" {statistics.mean(in_turn):.4f}; aim 1.005), {statistics.median(milliseconds):.1f} ms"
    )


def cost(length: int) -> float:
    """Arithmetic of a sequence in a model of 0.6 B parameters, half of it response."""
    return sequence_flops(SHAPE, length, length // 2)


if __name__ == "__main__":
    main()
