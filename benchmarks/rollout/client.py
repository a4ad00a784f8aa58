"""The rollout path against a bare aiohttp loop, on a stub of an engine that takes no time.

python benchmarks/rollout/client.py [--profile]

Both send the same requests with the same number in flight and decode the answers. Ours also takes prompts from the data
source, and makes checked samples of them: all of `collect`, but for the rewards, which run in processes of their own
(`benchmarks/rollout/rewards.py`). Seconds are of processor time of this process: what one core can do.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import orjson

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_model import make_model

from rltrain.arguments import parse
from rltrain.data.source import RolloutDataSource
from rltrain.rewards import pool as rewards
from rltrain.rollout.collect import collect
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.generate.single_turn import sampling_params
from rltrain.rollout.service.server import collect_garbage_rarely, prepare
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample

PROMPTS, SAMPLES, TOKENS, IN_FLIGHT, ROUNDS = 256, 8, 64, 256, 7


async def give_reward(config: Config, sample: Sample) -> None:
    """Stands for a process that grades."""
    sample.reward = 1.0


def make_args(root: Path, port: int) -> Config:
    model, prompts = make_model(root / "model", weights=False), root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{i}+{i}="}) + "\n" for i in range(1000)))
    config = parse(
        f"--hf-checkpoint {model} --prompt-data {prompts} --rm-type exact --num-rollout 1"
        f" --rollout-batch-size {PROMPTS} --n-samples-per-prompt {SAMPLES} --rollout-max-response-len {TOKENS}"
        f" --sglang-server-concurrency {IN_FLIGHT}".split()
    )
    config = prepare(config, RunLayout(root / "run"))
    config.namespace.sglang_router_ip, config.namespace.sglang_router_port = "127.0.0.1", port
    return config


async def ours(config: Config, source: RolloutDataSource) -> None:
    collected = await collect(config, 0, source)
    assert all(sample.response_length == TOKENS for group in collected.kept for sample in group)


async def bare(session: aiohttp.ClientSession, url: str, payloads: list[bytes]) -> None:
    semaphore = asyncio.Semaphore(IN_FLIGHT)

    async def one(payload: bytes) -> int:
        async with semaphore, session.post(url, data=payload) as response:
            return len(orjson.loads(await response.read())["output_ids"])

    assert set(await asyncio.gather(*(one(payload) for payload in payloads))) == {TOKENS}


async def compare(config: Config, profile: bool) -> dict[str, list[float]]:
    """Requests per second of processor time of each round."""
    collect_garbage_rarely()
    rewards.grade = give_reward
    client = HttpClient("benchmark")
    set_client(client)
    source = RolloutDataSource(config.namespace)
    body = {"sampling_params": sampling_params(config.rollout), "return_logprob": True}
    payloads = [
        orjson.dumps({"input_ids": sample.tokens, **body})
        for group in source.get_samples(PROMPTS)
        for sample in group
    ]
    url = f"http://127.0.0.1:{config.namespace.sglang_router_port}/generate"
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    headers = {"Authorization": "Bearer benchmark", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(ROUNDS + 1):
            for name, work in (("ours", ours(config, source)), ("bare", bare(session, url, payloads))):
                began = time.process_time()
                await work
                speeds[name].append(PROMPTS * SAMPLES / (time.process_time() - began))
        if profile:
            with cProfile.Profile() as profiler:
                await ours(config, source)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    await client.close()
    return {name: values[1:] for name, values in speeds.items()}  # the first round warms up


@contextmanager
def stub() -> Iterator[int]:
    """The port of a running stub."""
    command = [sys.executable, str(Path(__file__).parents[2] / "tests/fakes/stub_engine.py"), str(TOKENS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def main() -> None:
    with tempfile.TemporaryDirectory() as directory, stub() as port:
        speeds = asyncio.run(compare(make_args(Path(directory), port), "--profile" in sys.argv))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ranges = {name: f"{min(values):.0f} to {max(values):.0f}" for name, values in speeds.items()}
    print(
        f"rollout client: ours / bare = {medians['ours'] / medians['bare']:.3f} (aim: 0.8); ours"
        f" {medians['ours']:.0f} samples/s a core ({ranges['ours']}; aim: 3000), bare {medians['bare']:.0f}"
        f" ({ranges['bare']}); {PROMPTS} × {SAMPLES} responses of {TOKENS} tokens, {IN_FLIGHT} in flight,"
        f" {ROUNDS} rounds"
    )


if __name__ == "__main__":
    main()
