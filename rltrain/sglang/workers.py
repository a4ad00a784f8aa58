"""Adding engines to a router and taking them off, through whichever interface that router offers.

Current routers have `/workers`, which answers at once (202) and works in the background; older ones have
`/add_worker?url=…`, which is done when it answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from rltrain.sglang.http import HttpError, call

_POLL_INTERVAL = 0.1


def add_worker(router_url: str, token: str, worker: dict[str, Any], timeout: float = 120.0) -> None:
    """Add an engine, and wait until the router holds it for healthy.

    Args:
        router_url: of the router.
        token: that the router asks for.
        worker: `url`, `api_key` that the engine asks for, and what else the router takes, such as `worker_type`.
        timeout: in seconds.

    Raises:
        HttpError: the router refused.
        TimeoutError: it accepted, but the engine was not in use within `timeout` seconds.
    """
    worker_url = worker["url"]
    try:
        call("POST", f"{router_url}/workers", token, worker)
    except HttpError as error:
        if error.status not in (404, 405):
            raise
        call("POST", f"{router_url}/add_worker?{urlencode({'url': worker_url})}", token)
        return

    def in_use() -> bool:
        worker = find_worker(router_url, token, worker_url)
        return worker is not None and worker["is_healthy"]

    _wait(in_use, timeout, f"the router {router_url} did not take {worker_url} into use")


def remove_worker(router_url: str, token: str, worker_url: str, timeout: float = 60.0) -> None:
    """Take the engine at `worker_url` off the router, and wait until it is off; none there is no error.

    Raises:
        HttpError: the router refused.
        TimeoutError: it accepted, but still had the engine after `timeout` seconds.
    """
    try:
        worker = find_worker(router_url, token, worker_url)
    except HttpError as error:
        if error.status not in (404, 405):
            raise
        call("POST", f"{router_url}/remove_worker?{urlencode({'url': worker_url})}", token)
        return
    if worker is not None:
        call("DELETE", f"{router_url}/workers/{worker['id']}", token)
        _wait(
            lambda: find_worker(router_url, token, worker_url) is None,
            timeout,
            f"the router {router_url} still had {worker_url}",
        )


def find_worker(router_url: str, token: str, worker_url: str) -> dict[str, Any] | None:
    """The router's record of the engine at `worker_url`, or None."""
    workers = call("GET", f"{router_url}/workers", token)["workers"]
    return next((worker for worker in workers if worker["url"] == worker_url), None)


def _wait(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} within {timeout:.0f} s")
        time.sleep(_POLL_INTERVAL)
