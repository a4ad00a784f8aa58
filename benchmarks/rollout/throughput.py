"""Rollout throughput: our whole data path against a bare asyncio load generator on the same engine and router.

python benchmarks/rollout/throughput.py

Ours takes prompts from the data source, generates, grades every sample in the reward processes, and ends with
the batch as Parquet on disk and as Arrow bytes for the trainer. The bare loop posts the same requests and only
counts tokens. Rounds alternate, and the ratio is that of the medians.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import orjson

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_model import make_model

from rltrain.arguments import parse
from rltrain.data.source import RolloutDataSource
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.generate.single_turn import sampling_params
from rltrain.rollout.service.manager import RolloutManager
from rltrain.rollout.service.server import ipc_stream, prepare
from rltrain.run.layout import RunLayout
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.router import Router

TOKEN = "benchmark"
ROUNDS = 7
PROMPTS, SAMPLES, NEW_TOKENS, CONCURRENCY = 64, 8, 32, 64


def make_args(root: Path) -> Config:
    model = make_model(root / "model")
    prompts = root / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"input": f"{i}+{i}=", "label": str(2 * i)}) + "\n" for i in range(500))
    )
    args = parse(
        [
            *("--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--label-key", "label"),
            *("--rm-type", "exact", "--num-rollout", "1", "--rollout-batch-size", str(PROMPTS)),
            *("--n-samples-per-prompt", str(SAMPLES), "--rollout-max-response-len", str(NEW_TOKENS)),
            *("--sglang-server-concurrency", str(CONCURRENCY)),
        ]
    )
    return prepare(args, RunLayout(root / "run"))


async def ours(manager: RolloutManager, rollout_id: int) -> float:
    """Response tokens per second of one batch."""
    began = time.perf_counter()
    table = await manager.generate(rollout_id)
    ipc_stream(table)
    return sum(table["response_length"].to_pylist()) / (time.perf_counter() - began)


async def bare(session: aiohttp.ClientSession, url: str, payloads: list[bytes], concurrency: int) -> float:
    """Response tokens per second of the same number of requests."""
    semaphore = asyncio.Semaphore(concurrency)

    async def one(payload: bytes) -> int:
        async with semaphore, session.post(url, data=payload) as response:
            return len(orjson.loads(await response.read())["output_ids"])

    began = time.perf_counter()
    tokens = await asyncio.gather(*(one(payload) for payload in payloads))
    return sum(tokens) / (time.perf_counter() - began)


def make_payloads(args: Config) -> list[bytes]:
    """The requests of one batch."""
    groups = RolloutDataSource(args.namespace).get_samples(PROMPTS)
    body = {"sampling_params": sampling_params(args.rollout), "return_logprob": True}
    return [orjson.dumps({"input_ids": sample.tokens, **body}) for group in groups for sample in group]


async def compare(args: Config, root: Path, router_url: str) -> None:
    url = urlsplit(router_url)
    args.namespace.sglang_router_ip, args.namespace.sglang_router_port = url.hostname, url.port
    client = HttpClient(TOKEN)
    set_client(client)
    await rewards.start(args)
    manager = RolloutManager(args, RunLayout(root / "run"), attempt=0)
    payloads = make_payloads(args)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        for i in range(ROUNDS + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                speeds["ours"].append(await ours(manager, i))
            speeds["bare"].append(await bare(session, f"{router_url}/generate", payloads, CONCURRENCY))
    await rewards.close()
    await client.close()
    report({name: values[1:] for name, values in speeds.items()})  # the first round warms up


def report(speeds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ranges = {name: f"{min(values):.0f} to {max(values):.0f}" for name, values in speeds.items()}
    print(
        f"rollout throughput: ours / bare = {medians['ours'] / medians['bare']:.3f} (aim: 0.97);"
        f" ours {medians['ours']:.0f} tokens/s ({ranges['ours']}), bare {medians['bare']:.0f} ({ranges['bare']});"
        f" {PROMPTS} × {SAMPLES} responses of up to {NEW_TOKENS} tokens, {CONCURRENCY} in flight, {ROUNDS} rounds"
    )


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        args = make_args(root)
        server_args = {"model_path": args.model.hf_checkpoint, "log_level": "warning"}
        with Router({}, TOKEN) as router, HttpServerEngineAdapter.launch(server_args, TOKEN) as engine:
            engine.register(router.url)
            asyncio.run(compare(args, root, router.url))


if __name__ == "__main__":
    main()
