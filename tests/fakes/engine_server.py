"""A stand-in for router and engine: answers /generate as SGLang does, or as a list of faults says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aiohttp import web


class FakeEngine:
    """Echoes the prompt's last token `max_new_tokens` times; `faults` are answered first, one a request."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.url = ""
        self.faults: list[int | str] = []  # an HTTP code, "drop" the connection, or "abort" the request
        self.requests: list[dict[str, Any]] = []
        self.sessions: list[str | None] = []  # the routing key of each request
        self.most_in_flight = 0
        self._in_flight = 0

    def routes(self) -> list[web.RouteDef]:
        """What it listens to."""
        return [web.post("/generate", self.generate)]

    async def generate(self, request: web.Request) -> web.Response:
        """POST /generate."""
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="no token")
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            body = await request.json()
            self.requests.append(body)
            self.sessions.append(request.headers.get("X-SMG-Routing-Key"))
            await self.before_answer(body)
            fault = self.faults.pop(0) if self.faults else None
            if fault == "drop":
                assert request.transport is not None
                request.transport.close()
            if isinstance(fault, int):
                return web.Response(status=fault, text="a made-up fault")
            return web.json_response(self.answer(body, aborted=fault == "abort"))
        finally:
            self._in_flight -= 1

    async def before_answer(self, body: dict[str, Any]) -> None:
        """How long it takes."""
        await asyncio.sleep(0.001)

    def answer(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        """What it answers."""
        return answer(body, aborted=aborted)


T = TypeVar("T", bound=FakeEngine)


def answer(body: dict[str, Any], *, aborted: bool = False) -> dict[str, Any]:
    """What SGLang answers."""
    count, token = body["sampling_params"]["max_new_tokens"], body["input_ids"][-1]
    reason: dict[str, Any] = {"type": "length", "length": count}
    if aborted:
        reason, count = {"type": "abort", "message": "made up", "status_code": 500}, 0
    return {
        "text": "x" * count,
        "output_ids": [token] * count,
        "meta_info": {
            "finish_reason": reason,
            "weight_version": "3",
            "e2e_latency": 0.001,
            "weight_versions": [{"version": "3", "start": 0, "end": count}],
            "output_token_logprobs": [[-0.5, token, None]] * count,
        },
    }


@asynccontextmanager
async def fake_engine(token: str, kind: type[T] = FakeEngine) -> AsyncIterator[T]:  # type: ignore[assignment]
    """A running one, on a free port."""
    engine = kind(token)
    app = web.Application()
    app.add_routes(engine.routes())
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    engine.url = f"http://{host}:{port}"
    try:
        yield engine
    finally:
        await runner.cleanup()
