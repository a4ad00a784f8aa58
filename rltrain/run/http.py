"""JSON over HTTP between the processes of a job: blocking calls, for control traffic.

Generation has an asyncio client of its own, `rltrain/rollout/generate/http.py`, which retries alike.
"""

from __future__ import annotations

import http.client
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

# Answers after which the same request may succeed later: the server is away, overloaded, or about to be replaced.
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 5.0

# Proxies of the site must not swallow traffic inside the job.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HttpError(RuntimeError):
    """The server answered with an error; `status` is its HTTP code and `body` the answer's text."""

    def __init__(self, message: str, status: int, body: str = "") -> None:
        super().__init__(message)
        self.status, self.body = status, body


def call(method: str, url: str, token: str, body: Any = None, timeout: float = 30.0) -> Any:
    """Send `body` as JSON; return the answer, decoded when it is JSON and as text otherwise.

    Raises:
        HttpError: an answer of 400 or above, with the server's own words.
        OSError: no answer (`urllib.error.URLError` is one).
    """
    return _decode(call_raw(method, url, token, body, timeout))


def call_raw(method: str, url: str, token: str, body: Any = None, timeout: float = 30.0) -> bytes:
    """The same, with the answer as it came."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
        method=method,
    )
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            return response.read()
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace").strip()
        raise HttpError(f"{method} {url}: {error.code} {words[:2000]}", error.code, words) from None
    except http.client.HTTPException as error:  # it ended while it answered
        raise ConnectionError(f"{method} {url}: {type(error).__name__}: {error}") from error


def get_status(url: str, timeout: float) -> int:
    """HTTP code of a GET; for probes, which need no token."""
    try:
        with _OPENER.open(url, timeout=timeout) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def make_url(host: str, port: int, scheme: str = "http") -> str:
    """A server's URL without a slash at the end; see `host_and_port`."""
    return f"{scheme}://{host_and_port(host, port)}"


def host_and_port(host: str, port: int) -> str:
    """`HOST:PORT`, with an IPv6 address in brackets (RFC 3986, 3.2.2), whether it came in some or not."""
    return f"{in_brackets(host)}:{port}"


def in_brackets(host: str) -> str:
    """An IPv6 address in brackets, as it stands in URLs; a name or an IPv4 address as it is."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def pauses(first: float) -> Iterator[float]:
    """Seconds to wait before each further try of a request: ever longer, and not the same for all who wait."""
    pause = first
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        return content.decode(errors="replace")
