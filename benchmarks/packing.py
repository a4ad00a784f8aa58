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
from rltrain.data.prefixes import Prefixes
from rltrain.data.tree_packing import pack_tree
from rltrain.megatron.training.flops import sequence_flops

CAPACITY = 8192
REPEATS = 30
SHAPE = read_model_shape(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
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
    for mean in (5.0, 6.5):
        groups(mean)
    for count in (1024, 4096):
        balance(count, ranks=32, by_flops=False)
        balance(count, ranks=32, by_flops=True)


def groups(mean: float) -> None:
    """128 groups of 8 with a prompt in common, whose tokens are lognormal(mean, 0.5), against a lower bound.

    The bound counts a prompt as often as its group takes micro-batches that are filled to the last token.
    """
    ratios, milliseconds, finding = [], [], []
    for seed in range(REPEATS):
        rng = np.random.default_rng(seed)
        prompts = np.clip(rng.lognormal(mean, 0.5, 128), 16, CAPACITY // 4).astype(int)
        responses = np.minimum(np.array(lengths(seed)).reshape(128, 8), (CAPACITY - prompts)[:, None])
        samples = [
            np.concatenate([rng.integers(0, 50_000, prompt), rng.integers(0, 50_000, response)])
            for prompt, own in zip(prompts, responses, strict=True)
            for response in own
        ]
        for i, prompt in enumerate(prompts):
            for sample in samples[8 * i : 8 * i + 8]:
                sample[:prompt] = samples[8 * i][:prompt]
        start = time.perf_counter()
        prefixes = Prefixes.of(samples)
        found = time.perf_counter()
        bins = pack_tree([len(sample) for sample in samples], prefixes, CAPACITY)
        finding.append((found - start) * 1e3)
        milliseconds.append((time.perf_counter() - found) * 1e3)
        pieces = np.ceil(responses.sum(1) / (CAPACITY - prompts))
        ratios.append(math.ceil((pieces * prompts + responses.sum(1)).sum() / CAPACITY) / len(bins))
    print(
        f"groups of 8 with prompts of {math.exp(mean + 0.125):.0f} tokens: lower bound / micro-batches ="
        f" {statistics.mean(ratios):.4f} (worst {min(ratios):.4f}), {statistics.median(milliseconds):.2f} ms for 1024"
        f" samples (aim: 0.99 in 5 ms), and {statistics.median(finding):.1f} ms to find what they share"
    )


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
