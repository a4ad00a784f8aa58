"""Packing: tokens per micro-batch against the lower bound, and time, for 1024 lognormal lengths at cap 8192.

python benchmarks/packing.py
"""

from __future__ import annotations

import math
import statistics
import time

import numpy as np

from rltrain.data.packing import pack, plan_step

CAPACITY = 8192
REPEATS = 30


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
    for ranks in (8, 32):
        fullest, times = [], []
        for seed in range(REPEATS):
            sample = lengths(seed, 4096)
            start = time.perf_counter()
            plan = plan_step(sample, ranks, max_tokens=CAPACITY)
            times.append((time.perf_counter() - start) * 1e3)
            loads = [sum(sample[i] for b in rank for i in b) for rank in plan.micro_batches]
            fullest.append(max(loads) / statistics.mean(loads))
        print(
            f"plan of 4096 sequences over {ranks} ranks: fullest rank / mean = {statistics.mean(fullest):.4f},"
            f" {statistics.median(times):.1f} ms"
        )


if __name__ == "__main__":
    main()
