"""The asyncio HTTP client of everything that generates: one connection pool, retries, the job's token."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import aiohttp

from rltrain.rollout import request_times

orjson: ModuleType | None
try:
    import orjson  # several times faster than json; comes with SGLang
except ImportError:
    orjson = None

# How long a request may find nobody who answers: an engine that died is replaced within minutes.
RETRY_SECONDS = 300.0
# A request that failed after so long was being served, and its patience begins anew; not more often than engines die.
_SERVED_SECONDS, _MOST_SERVED = 60.0, 3
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 5.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})

_dumps: Callable[[Any], bytes] = orjson.dumps if orjson else lambda value: json.dumps(value).encode()
_loads: Callable[[bytes], Any] = orjson.loads if orjson else json.loads


class GenerationError(RuntimeError):
    """A request that failed for good; the message has the server's words."""


class HttpClient:
    """POSTs JSON from within one event loop."""

    def __init__(self, token: str) -> None:
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
        delay = _FIRST_DELAY
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
                    if response.status not in _RETRIED:
                        raise GenerationError(problem)
            except (aiohttp.ClientError, _RefusedError) as error:
                problem = f"{url}: {type(error).__name__}: {error}"
            if clock() - began > min(_SERVED_SECONDS, retry_seconds) and served < _MOST_SERVED:
                deadline, delay, served = clock() + retry_seconds, _FIRST_DELAY, served + 1
            if clock() + delay > deadline:
                raise GenerationError(f"{problem} (given up after {retry_seconds:.0f} s of trying)")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # not all at once
            delay = min(2 * delay, _LONGEST_DELAY)


class _RefusedError(Exception):
    """An answer that we do not take."""


@lru_cache
def _origin(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


def _unknown_version(answer: Any) -> str | None:
    """A version of the weights of an answer to /generate that is none of ours, which are numbers.

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


async def post(
    url: str, payload: Any, max_retries: int | None = None, headers: Mapping[str, str] | None = None
) -> Any:
    """POST JSON with the job's client; for custom generation functions (slime's name and arguments).

    `max_retries` is accepted for slime's sake; what bounds the retries here is time. The time that it takes
    is counted to the sample that is being generated.
    """
    if _client is None:
        raise RuntimeError("no HTTP client: generation functions run inside the rollout process")
    times = request_times.current()
    if times is None:
        return await _client.post(url, payload, headers=headers)
    began, answer = time.perf_counter(), None
    times.request_began()
    try:
        answer = await _client.post(url, payload, headers=headers)
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


async def get(url: str) -> Any:
    """GET JSON with the job's client."""
    if _client is None:
        raise RuntimeError("no HTTP client: generation functions run inside the rollout process")
    return await _client.get(url)
