"""The asyncio HTTP client of everything that generates: one connection pool, retries, the job's token."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import aiohttp

from rltrain.rollout.generate import timing
from rltrain.run.http import RETRIED, pauses

orjson: ModuleType | None
try:
    import orjson  # several times faster than json; comes with SGLang
except ImportError:
    orjson = None

# How long a request may stay unanswered: an engine that died is replaced within minutes.
RETRY_SECONDS = 300.0
# A request that failed after so long was being served, and its patience starts over; not more often than engines die.
_SERVED_SECONDS, _MOST_SERVED = 60.0, 3
_FIRST_PAUSE = 0.05

_dumps: Callable[[Any], bytes] = orjson.dumps if orjson else lambda value: json.dumps(value).encode()
_loads: Callable[[bytes], Any] = orjson.loads if orjson else json.loads


class GenerationError(RuntimeError):
    """A request that failed for good; the message has the server's words."""


class HttpClient:
    """POSTs JSON from within one event loop.

    Attributes:
        loop: That event loop.
    """

    def __init__(self, token: str) -> None:
        self.loop = asyncio.get_running_loop()
        # No limit on connections: how many requests are in flight is bounded by who sends them. No timeout:
        # a long response takes as long as it takes.
        self._session = aiohttp.ClientSession(
            headers={
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",  # nothing to be gained within a cluster
            },
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

        self._tokens: dict[str, str] = {}
        self._origins_with_versions: set[str] = set()

    def set_token(self, url: str, token: str) -> None:
        """Send `token`, in place of the job's, to the server at `url`: one that the job did not start."""
        self._tokens[_origin(url)] = token

    def refuse_unknown_weights(self, url: str) -> None:
        """Ask the router at `url` again when an answer was generated with weights that the trainer did not send.

        An engine that restarts by itself has those that it began with, and the router takes it back at once.
        """
        self._origins_with_versions.add(_origin(url))

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    def post(
        self,
        url: str,
        payload: Any,
        retry_seconds: float = RETRY_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """The JSON answer; tried again, ever more slowly, while the server is away or overloaded.

        Raises:
            GenerationError: the server refused the request, or did not answer for `retry_seconds`.
        """
        return self._request("POST", url, _dumps(payload), retry_seconds, headers)

    def get(self, url: str, retry_seconds: float = RETRY_SECONDS) -> Coroutine[Any, Any, Any]:
        """The same for GET."""
        return self._request("GET", url, None, retry_seconds)

    async def _request(
        self,
        method: str,
        url: str,
        body: bytes | None,
        retry_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        origin = _origin(url)
        if origin in self._tokens:
            headers = {**(headers or {}), "Authorization": f"Bearer {self._tokens[origin]}"}
        clock = asyncio.get_running_loop().time
        deadline, served = clock() + retry_seconds, 0
        waits = pauses(_FIRST_PAUSE)
        while True:
            began = clock()
            try:
                async with self._session.request(method, url, data=body, headers=headers) as response:
                    content = await response.read()
                    if response.status == 200:
                        answer = _loads(content) if content else None
                        version = _unknown_version(answer) if origin in self._origins_with_versions else None
                        if version is None:
                            return answer
                        raise _RefusedError(f"generated with weights of the unknown version {version!r}")
                    problem = f"{url}: {response.status} {content.decode(errors='replace').strip()[:1000]}"
                    if response.status not in RETRIED:
                        raise GenerationError(problem)
            except (aiohttp.ClientError, _RefusedError) as error:
                problem = f"{url}: {type(error).__name__}: {error}"
            if clock() - began > min(_SERVED_SECONDS, retry_seconds) and served < _MOST_SERVED:
                deadline, waits, served = clock() + retry_seconds, pauses(_FIRST_PAUSE), served + 1
            pause = next(waits)
            if clock() + pause > deadline:
                raise GenerationError(f"{problem} (given up after {retry_seconds:.0f} s of trying)")
            await asyncio.sleep(pause)


class _RefusedError(Exception):
    """An answer that we do not take."""


@lru_cache
def _origin(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _unknown_version(answer: Any) -> str | None:
    """The version of the weights that wrote an answer to /generate, if the trainer did not send it: ours are numbers.

    The weights may have been changed meanwhile: then each part of the answer has its version.
    """
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        return None
    versions = [str(span["version"]) for span in meta.get("weight_versions") or ()]
    return next(
        (each for each in [*versions, str(meta.get("weight_version", "0"))] if not each.isdigit()), None
    )


_client: HttpClient | None = None


def set_client(client: HttpClient | None) -> None:
    """Make `client` the one that `post` uses: generation functions are called without any."""
    global _client
    _client = client


def _get_client() -> HttpClient:
    """The client that was set. A reward process gets one of its own, so that a reward can ask a judge of the run.

    Raises:
        RuntimeError: this process does not belong to a job.
    """
    token = os.environ.get("SLURMLIME_TOKEN")
    if _client is None and token:
        set_client(HttpClient(token))
    if _client is None:
        raise RuntimeError("no HTTP client: generation functions run inside the rollout process")
    return _client


async def post(
    url: str, payload: Any, max_retries: int | None = None, headers: Mapping[str, str] | None = None
) -> Any:
    """POST JSON with the job's client; for custom generation functions (slime's name and arguments).

    `max_retries` is accepted because slime has it; here time bounds the retries. The time that it takes
    is counted to the sample that is being generated.
    """
    client, times = _get_client(), timing.current_clock()
    if times is None:
        return await client.post(url, payload, headers=headers)
    began, answer = time.perf_counter(), None
    times.request_began()
    try:
        answer = await client.post(url, payload, headers=headers)
    finally:
        times.request_ended(answer, time.perf_counter() - began)
    return answer


def session_headers(args: argparse.Namespace, session_id: str | None) -> dict[str, str] | None:
    """Headers that bring all requests of a session to the same engine, whose cache has what came before.

    For `--router-policy consistent_hashing` or `manual`; routers with another policy would take no notice.
    """
    if session_id is None or args.router.get("policy") not in ("consistent_hashing", "manual"):
        return None
    return {"X-SMG-Routing-Key": session_id}


def client_loop() -> asyncio.AbstractEventLoop:
    """The event loop in which this process sends its requests.

    Raises:
        RuntimeError: this process does not belong to a job.
    """
    return _get_client().loop


async def get(url: str) -> Any:
    """GET JSON with the job's client."""
    return await _get_client().get(url)
