"""Blocking JSON calls to engines and router, for control traffic. Generation has its own asyncio client."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

# Proxies of the site must not swallow traffic inside the job.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HttpError(RuntimeError):
    """The server answered with an error; `status` is its HTTP code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def call(method: str, url: str, token: str, body: Any = None, timeout: float = 30.0) -> Any:
    """Send `body` as JSON; return the answer, decoded when it is JSON and as text otherwise.

    Raises:
        HttpError: an answer of 400 or above, with the server's own words.
        OSError: no answer (`urllib.error.URLError` is one).
    """
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {token}"},
        method=method,
    )
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            return _decode(response.read())
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace").strip()[:2000]
        raise HttpError(f"{method} {url}: {error.code} {words}", error.code) from None
    except http.client.HTTPException as error:  # it ended while it answered
        raise ConnectionError(f"{method} {url}: {type(error).__name__}: {error}") from error


def get_status(url: str, timeout: float) -> int:
    """HTTP code of a GET; for probes, which need no token."""
    try:
        with _OPENER.open(url, timeout=timeout) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def _decode(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        return content.decode(errors="replace")
