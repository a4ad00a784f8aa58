"""Partial rollouts: responses that are stopped keep their tokens, and are gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from conftest import TOKEN
from fakes.engine_server import answer

from rltrain.data.source import RolloutDataSource
from rltrain.rewards import service as rewards
from rltrain.rollout.collect import Collected, collect
from rltrain.rollout.http import HttpClient, set_client
from rltrain.sample import Sample


class AbortableEngine:
    """Answers even requests at once; of the others, all that are waiting when told to abort get 5 tokens."""

    def __init__(self) -> None:
        self.url = ""
        self.patient = False  # answers everything
        self.requests: list[dict[str, Any]] = []
        self._aborted = asyncio.Event()

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        if self.patient or len(self.requests) % 2:
            return web.json_response(answer(body))
        await self._aborted.wait()
        body["sampling_params"]["max_new_tokens"] = 5
        result = answer(body)
        result["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        return web.json_response(result)

    async def abort(self, request: web.Request) -> web.Response:
        assert (await request.json())["abort_all"] is True
        self._aborted.set()
        return web.Response()

    async def workers(self, request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"url": self.url}]})


@asynccontextmanager
async def abortable_engine(args: Any) -> AsyncIterator[AbortableEngine]:
    engine = AbortableEngine()
    app = web.Application()
    app.add_routes([web.post("/generate", engine.generate), web.post("/abort_request", engine.abort),
                    web.get("/workers", engine.workers)])  # fmt: skip
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    engine.url = f"http://{host}:{port}"
    url = urlsplit(engine.url)
    args.sglang_router_ip, args.sglang_router_port = url.hostname, url.port
    client = HttpClient("token")
    set_client(client)
    try:
        yield engine
    finally:
        set_client(None)
        await rewards.close()
        await client.close()
        await runner.cleanup()


def two_rollouts(args: Any) -> tuple[Collected, list[list[Sample]], Collected]:
    """A rollout that stops some groups, what it gave back (after a restart), and the rollout after it."""

    async def use() -> Any:
        async with abortable_engine(args) as engine:
            source = RolloutDataSource(args)
            first = await collect(args, 0, source)
            source.save(0)
            restarted = RolloutDataSource(args)
            restarted.load(0)
            given_back = [list(group) for group in restarted._buffer]
            before = {sample.index: list(sample.tokens) for group in given_back for sample in group}
            engine.patient = True
            second = await collect(args, 1, restarted)
            for group in second.kept:
                for sample in group:
                    prefix = before.get(sample.index, [])
                    assert sample.tokens[: len(prefix)] == prefix
            return first, given_back, second

    return asyncio.run(use())


FLAGS = ("--rollout-batch-size", "2", "--over-sampling-batch-size", "4", "--n-samples-per-prompt", "1",
         "--partial-rollout")  # fmt: skip


def test_stopped_responses_are_gone_on_with_after_a_restart(make_args: Any) -> None:
    first, given_back, second = two_rollouts(make_args(*FLAGS))
    assert len(first.kept) == 2 and first.metrics["rollout/partial/given_back"] == 2
    assert len(given_back) == 2 and second.metrics["rollout/partial/continued"] == 2
    samples = [sample for group in second.kept for sample in group]
    for sample in samples:
        assert sample.response_length == 16 and len(sample.response) == 16  # 5 and 11 more
        assert sample.loss_mask == [1] * 16 and len(sample.rollout_log_probs or []) == 16
        assert sample.metadata["start_rollout_id"] == 0 and sample.status is Sample.Status.TRUNCATED
        assert sample.reward is not None


def test_tokens_of_older_weights_can_be_masked(make_args: Any) -> None:
    *_, second = two_rollouts(make_args(*FLAGS, "--mask-offpolicy-in-partial-rollout"))
    for group in second.kept:
        assert group[0].loss_mask == [0] * 5 + [1] * 11


@pytest.mark.slow
def test_a_real_engine_stops_early_and_goes_on(engine: Any, router: Any, make_args: Any) -> None:
    args = make_args(*FLAGS, "--rollout-max-response-len", "64", "--rollout-temperature", "1.5",
                     "--sglang-server-concurrency", "3")  # fmt: skip
    url = urlsplit(router.url)
    args.sglang_router_ip, args.sglang_router_port = url.hostname, url.port

    async def use() -> tuple[Collected, int, Collected]:
        client = HttpClient(TOKEN)
        set_client(client)
        try:
            source = RolloutDataSource(args)
            first = await collect(args, 0, source)
            waiting = source.get_buffer_length()
            return first, waiting, await collect(args, 1, source)
        finally:
            set_client(None)
            await rewards.close()
            await client.close()

    first, waiting, second = asyncio.run(use())
    assert waiting == 4 - 2
    for group in first.kept + second.kept:
        for sample in group:
            assert sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED), sample.failure
            assert sample.response_length <= 64
            assert sample.prefill_seconds > 0 and sample.decode_seconds > 0 and sample.queue_seconds > 0
            assert sample.prefill_seconds + sample.decode_seconds <= sample.generate_seconds
            assert (
                len(sample.rollout_log_probs or []) == len(sample.loss_mask or []) == sample.response_length
            )
