"""Lets the requests of many sessions through a few at a time, so that the event loop has its turn between them."""

from __future__ import annotations

import asyncio

# In a round of the event loop, at about half a millisecond each. Fewer make more rounds, which cost something too.
AT_ONCE = 16


class Turnstile:
    """Use as an async context manager around work that holds the event loop up: a few pass in each of its rounds.

    Where a thousand agents ask at the same moment, a round would otherwise render, tokenise and parse for all of them
    before anything else of the rollout has its turn. Who comes first is first.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> None:
        await self._places.acquire()
        try:
            await asyncio.sleep(0)  # who comes in the same round finds the places taken
        except BaseException:
            self._places.release()
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._places.release()
