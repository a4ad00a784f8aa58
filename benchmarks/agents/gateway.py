"""The agents' gateway on a stub of an engine that takes no time: what a turn costs, and many sessions at once.

python benchmarks/agents/gateway.py [--profile]

The agents are a process of their own; each holds a conversation of several turns, and sends all of it every time, as
they do. Seconds are of processor time of the gateway's process. The baseline sends the same token ids straight to the
engine from the same process. Prefix reuse is the share of the tokens of earlier turns that a turn's prompt begins with.
All agents ask as fast as they can and the engine answers at once, so the loop is saturated: its lag is the worst case.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

SESSIONS, MANY, TURNS, TOKENS = 256, 1000, 8, 64
WORDS = "an agent looks at the files, finds 12 of them, and then it tells what is in one of these. " * 3


async def agent(client: aiohttp.ClientSession, url: str, key: str, model: str) -> None:
    """One conversation."""
    messages: list[dict[str, Any]] = []
    for _ in range(TURNS):
        messages.append({"role": "user", "content": WORDS})
        body = {"model": model, "messages": messages}
        headers = {"Authorization": f"Bearer {key}"}
        async with client.post(f"{url}/chat/completions", json=body, headers=headers) as response:
            answer = await response.json()
        assert response.status == 200, answer
        messages.append(answer["choices"][0]["message"])


async def agents() -> None:
    """All of them at once; who they are comes on standard input."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        await asyncio.gather(*(agent(client, *each) for each in json.loads(sys.stdin.read())))


async def converse(gateway: Any, config: Any, count: int) -> dict[str, float]:
    """`count` sessions at once: seconds and milliseconds a turn, megabytes, lag of the loop, prefix reuse."""
    from fakes.agents import params

    from rltrain.rollout.generate.timing import LoopLag
    from rltrain.sample import Sample

    before = psutil.Process().memory_info().rss
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(gateway.open(Sample(index=i, prompt="x"), params(config)))
            for i in range(count)
        ]
        who = json.dumps([(each.base_url, each.api_key, each.model) for each in opened]).encode()
        command = [sys.executable, __file__, "--agents"]
        process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
        cpu, wall = time.process_time(), time.perf_counter()
        async with LoopLag() as lag:
            await process.communicate(who)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert process.returncode == 0
        grown = psutil.Process().memory_info().rss - before
        turns = count * TURNS
        held = kept = 0
        for session in opened:
            lengths = [turn.length for turn in session.trajectory.turns.values()]
            held += sum(lengths[:-1])
            parents = [turn.parent for turn in session.trajectory.turns.values()]
            kept += sum(lengths[parent] for parent in parents if parent is not None)
            assert sum(len(sample.loss_mask or []) > 0 for sample in session.samples()) >= 1
        straight = await straight_to_the_engine(config, opened)
    return {
        "cpu_ms": 1000 * cpu / turns, "straight_ms": 1000 * straight / turns, "turns_per_s": turns / wall,
        "mb": grown / 2**20, "reuse": kept / held, **lag.metrics(),
    }  # fmt: skip


async def straight_to_the_engine(config: Any, sessions: list[Any]) -> float:
    """Processor seconds of the same requests, as token ids, without the gateway."""
    from fakes.agents import params

    from rltrain.rollout.generate.single_turn import generate
    from rltrain.sample import Sample

    prompts = []
    for session in sessions:
        for number, turn in session.trajectory.turns.items():
            prompts.append(list(session.trajectory.tokens(number)[: turn.prompt_length]))
    places = asyncio.Semaphore(len(sessions))
    given = {**params(config), "max_new_tokens": TOKENS}

    async def one(prompt: list[int]) -> None:
        async with places:
            await generate(config.namespace, Sample(tokens=prompt), given)

    cpu = time.process_time()
    await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.process_time() - cpu


async def measure(directory: Path, port: int, profile: bool) -> None:
    from fakes.agents import agent_config, make_agent_model
    from helpers.rollout import http_client

    from rltrain.agents.gateway.server import Gateway
    from rltrain.rollout.service.server import collect_garbage_rarely

    config = agent_config(make_agent_model(directory / "model"), directory)
    async with http_client(config, f"http://127.0.0.1:{port}"), Gateway(config, "127.0.0.1") as gateway:
        collect_garbage_rarely()
        await converse(gateway, config, 8)  # templates and parsers are compiled
        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        few = await converse(gateway, config, SESSIONS)
        if profile:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
            return
        many = await converse(gateway, config, MANY)
    over = few["cpu_ms"] - few["straight_ms"]
    print(
        f"{SESSIONS} sessions of {TURNS} turns: {few['cpu_ms']:.2f} ms a turn, {few['turns_per_s']:.0f} turns/s"
    )
    print(f"  straight to the engine {few['straight_ms']:.2f} ms, so the gateway costs {over:.2f} ms a turn")
    print(f"  prefix reuse {few['reuse']:.3f} of the possible")
    print(
        f"{MANY} sessions at once: {many['mb']:.0f} MB more, loop lag p99 {1000 * many['perf/loop_lag_p99']:.0f} ms,"
        f" max {1000 * many['perf/loop_lag_max']:.0f} ms, {many['turns_per_s']:.0f} turns/s"
    )


def main() -> None:
    if "--agents" in sys.argv:
        asyncio.run(agents())
        return
    stub = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fakes/stub_engine.py"), str(TOKENS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert stub.stdout is not None
    try:
        with tempfile.TemporaryDirectory() as directory:
            port = int(stub.stdout.readline())
            asyncio.run(measure(Path(directory), port, "--profile" in sys.argv))
    finally:
        stub.communicate()


if __name__ == "__main__":
    main()
