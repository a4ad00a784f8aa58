"""Overlap: wall time of generation and training side by side, against the longer of the two alone.

python benchmarks/rollout/overlap.py

The rollout process's own code (data source, requests, rewards, Parquet, look-ahead) speaks to a stub engine over
HTTP: so many requests at a time, each as long as a heavy-tailed draw says, and no work. The trainer is a stand-in
that sleeps, half as long as a rollout takes on average, as long, and twice as long, and names the next weights. So
the ratio is about scheduling, and the cores are idle. As a rollout may begin while the longest responses of the one
before end, it can be below 1.

Beside each ratio stands the least that is possible, even for who knows all lengths beforehand: no token of rollout k
may come from weights older than k - K, so its longest response can't begin before these are there, and training on
it can't begin before that response ends. In a batch of lognormal lengths, the longest response takes the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fakes.engine_server import FakeEngine, fake_engine
from helpers.tiny_model import make_model

from rltrain.arguments import parse
from rltrain.data.source import RolloutDataSource
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.generate.look_ahead import LookAhead
from rltrain.rollout.service.manager import RolloutManager
from rltrain.rollout.service.server import prepare
from rltrain.run.layout import RunLayout

TOKEN = "benchmark"
ROLLOUTS, PROMPTS, SAMPLES, SLOTS = 16, 16, 8, 32
TRAIN_SHARES = (0.5, 1.0, 2.0)
MEAN_SECONDS, SIGMA = (
    0.05,
    1.2,
)  # of a request: lognormal, so that the longest of a batch takes 20 times the mean


class StubEngine(FakeEngine):
    """As many requests at a time as an engine has places; the others wait."""

    def __init__(self, token: str) -> None:
        """Stand in for an engine."""
        super().__init__(token)
        self.version = "0"
        self._slots = asyncio.Semaphore(SLOTS)
        self._asked: Counter[tuple[int, ...]] = Counter()

    def answer(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        """A made-up response of the present version."""
        output = super().answer(body, aborted=aborted)
        output["meta_info"]["weight_versions"][0]["version"] = self.version
        return output

    async def before_answer(self, body: dict[str, Any]) -> None:
        """Wait for a place, and hold it for as long as the n-th response to this prompt always takes."""
        prompt = tuple(body["input_ids"])
        self._asked[prompt] += 1
        async with self._slots:
            await asyncio.sleep(response_seconds(prompt, self._asked[prompt]))


def response_seconds(prompt: tuple[int, ...], number: int) -> float:
    """How long the response of this number to the prompt takes."""
    draw = random.Random(f"{prompt}/{number}")
    return draw.lognormvariate(-SIGMA * SIGMA / 2, SIGMA) * MEAN_SECONDS


def least_wall(lengths: list[list[float]], staleness: int, train_seconds: float) -> float:
    """Wall seconds below which no order of the requests can get.

    Args:
        lengths: Seconds of each response of each rollout.
    """
    versions = [0.0]  # when the weights of each version are there
    for k, own in enumerate(lengths):
        ready = max(versions[k], versions[max(0, k - staleness)] + max(own))
        work = 0.0
        for j in range(k, -1, -1):  # all that rollouts j to k have to do, in all places
            work += sum(lengths[j]) / SLOTS
            ready = max(ready, versions[max(0, j - staleness)] + work)
        versions.append(ready + train_seconds)
    return versions[-1]


async def run(args: Config, root: Path, staleness: int, train_seconds: float) -> float:
    """Wall seconds of all rollouts and steps."""
    args = args.replace(max_staleness=staleness, num_rollout=ROLLOUTS)
    layout = RunLayout(root / f"run-{staleness}-{train_seconds:.3f}")
    args = prepare(args, layout)
    async with fake_engine(TOKEN, StubEngine) as engine:
        url = urlsplit(engine.url)
        args.namespace.sglang_router_ip, args.namespace.sglang_router_port = url.hostname, url.port
        client = HttpClient(TOKEN)
        set_client(client)
        await rewards.start(args)
        manager = RolloutManager(args, layout, attempt=0)
        rollouts = LookAhead(manager.generate, ahead=staleness, end=ROLLOUTS)
        await rollouts.restart(0)
        manager.load(0)
        began = time.perf_counter()
        for step in range(ROLLOUTS):
            engine.version = str(step)
            await rollouts.weights(step)
            await rollouts.get(step)
            await asyncio.sleep(train_seconds)
        seconds = time.perf_counter() - began
        await rollouts.close()
        await rewards.close()
        await client.close()
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        prompts = root / "prompts.jsonl"
        rows = [{"input": f"{i}+{i}=", "label": str(2 * i)} for i in range(ROLLOUTS * PROMPTS)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = f"--hf-checkpoint {make_model(root / 'model', weights=False)} --prompt-data {prompts}"
        flags += f" --label-key label --rm-type exact --num-rollout {ROLLOUTS} --rollout-batch-size {PROMPTS}"
        flags += f" --n-samples-per-prompt {SAMPLES} --rollout-max-response-len 8"
        args = parse(flags.split())
        with contextlib.redirect_stdout(io.StringIO()):
            generation = asyncio.run(run(args, root, 0, 0.0))
            source, ratios = RolloutDataSource(args.namespace), {}
            groups = [source.get_samples(PROMPTS) for _ in range(ROLLOUTS)]
            lengths = [
                [response_seconds(tuple(group[0].tokens), 1 + i) for group in each for i in range(len(group))]
                for each in groups
            ]
            for staleness, share in itertools.product((1, 2), TRAIN_SHARES):
                train_seconds = share * generation / ROLLOUTS
                wall = asyncio.run(run(args, root, staleness, train_seconds))
                least = least_wall(lengths, staleness, train_seconds)
                longer = generation * max(1.0, share)
                ratios[staleness, share] = f"{wall / longer:.2f} (least {least / longer:.2f}; {share:g} ×)"
    for staleness in (1, 2):
        shown = ", ".join(ratios[staleness, share] for share in TRAIN_SHARES)
        print(f"overlap at --max-staleness {staleness}: wall / max(generation, training) = {shown}")
    print(
        f"(training that many times as long as generation; aim: 1.1, or the least; {ROLLOUTS} rollouts of"
        f" {PROMPTS} × {SAMPLES} requests at a stub engine with {SLOTS} places, generation alone {generation:.1f} s)"
    )


if __name__ == "__main__":
    main()
