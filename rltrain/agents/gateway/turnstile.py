"""Lets the requests of many sessions through one by one, so that the event loop has its turn between them."""

from __future__ import annotations

import asyncio


class Turnstile:
    """Use as an async context manager around work that holds the event loop up: one passes in each of its rounds.

    Where a thousand agents ask at the same moment, a round would otherwise render, tokenise and parse for all of them
    before anything else of the rollout has its turn. Who comes first is first.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()
        try:
            await asyncio.sleep(0)  # who comes in the same round finds it locked
        except BaseException:
            self._lock.release()
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._lock.release()
