"""Rewards per second with 1 % of graders hanging, against none; and for how long the event loop was kept.

python benchmarks/rollout/rewards.py

Once with a grader that waits for something that never comes (a coroutine, cancelled at its timeout), once with one
that never returns (another process takes its place, as far as there may be more, and its own is killed). The lag
is that of the loop that would also send the requests of a rollout.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_model import make_model

from rltrain.arguments import parse
from rltrain.rewards.pool import RewardPool
from rltrain.rewards.worker import Grade
from rltrain.rollout.generate.timing import LoopLag
from rltrain.sample import Sample

TIMEOUT, WORKERS, TOKENS, IN_FLIGHT = 0.5, 4, 512, 256
COUNTS = {"waits": 20_000, "hangs": 10_000}
GRADERS = """
import asyncio, time

async def waits(args, sample):
    if sample.metadata["hangs"]:
        await asyncio.sleep(1e6)
    return float(len(sample.response))

def hangs(args, sample):
    if sample.metadata["hangs"]:
        time.sleep(1e6)
    return float(len(sample.response))
"""


def make_samples(count: int, one_in: int | None) -> list[Sample]:
    return [
        Sample(index=i, tokens=[7] * TOKENS, response="x" * TOKENS, response_length=TOKENS,
               metadata={"hangs": one_in is not None and i % one_in == one_in - 1})
        for i in range(count)
    ]  # fmt: skip


async def measure(config: Config, path: str, samples: list[Sample]) -> tuple[float, float]:
    """Rewards per second, and the 99th percentile of the loop's lag in milliseconds."""
    pool, semaphore = await RewardPool.start(config, path), asyncio.Semaphore(IN_FLIGHT)

    async def grade(sample: Sample) -> Grade:
        async with semaphore:
            return await pool.grade(sample)

    try:
        await asyncio.gather(*(grade(sample) for sample in make_samples(200, None)))
        async with LoopLag() as lag:
            began = time.perf_counter()
            grades = await asyncio.gather(*(grade(sample) for sample in samples))
            seconds = time.perf_counter() - began
    finally:
        await pool.close()
    failed = sum(grade.failure is not None for grade in grades)
    assert failed == sum(sample.metadata["hangs"] for sample in samples)
    return len(samples) / seconds, 1000 * lag.metrics()["perf/loop_lag_p99"]


async def compare(config: Config) -> None:
    for name, count in COUNTS.items():
        path = f"benchmark_graders.{name}"
        without, lag_without = await measure(config, path, make_samples(count, None))
        with_hanging, lag = await measure(config, path, make_samples(count, 100))
        print(
            f"rewards, 1 % {name}: {with_hanging:.0f} a second against {without:.0f} without"
            f" ({with_hanging / without:.2f}); p99 loop lag {lag:.1f} ms against {lag_without:.1f};"
            f" {WORKERS} processes, --reward-timeout {TIMEOUT:g}, {count} samples of {TOKENS} tokens"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "benchmark_graders.py").write_text(GRADERS)
        (root / "p.jsonl").write_text('{"input": "1"}\n')
        sys.path.insert(0, directory)
        os.environ["PYTHONPATH"] = f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        config = parse(
            f"--hf-checkpoint {make_model(root / 'model', weights=False)} --prompt-data {root / 'p.jsonl'}"
            f" --num-rollout 1 --rollout-batch-size 1 --custom-rm-path benchmark_graders.waits"
            f" --reward-num-workers {WORKERS} --reward-timeout {TIMEOUT}".split()
        )
        asyncio.run(compare(config))


if __name__ == "__main__":
    main()
