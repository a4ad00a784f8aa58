"""A reward that a server computes: `--rm-type remote_rm --rm-url URL`."""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

import aiohttp

from rltrain.sample import Sample

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0


async def remote_rm(args: argparse.Namespace, sample: Sample) -> Any:
    """POST prompt, response, label and metadata as JSON; the answer is the reward: a number or a dict.

    A server that is away or overloaded is asked again until `--reward-timeout`, ever more slowly.

    Raises:
        RuntimeError: it refused the request.
    """
    payload = {
        "prompt": sample.prompt,
        "response": sample.response,
        "label": sample.label,
        "metadata": sample.metadata,
    }
    delay = _FIRST_DELAY
    async with aiohttp.ClientSession(trust_env=False) as session:
        while True:
            try:
                async with session.post(args.rm_url, json=payload) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"{args.rm_url}: {response.status} {(await response.text())[:500].strip()}"
                    if response.status not in _RETRIED:
                        raise RuntimeError(problem)
            except aiohttp.ClientConnectionError as error:
                problem = f"{args.rm_url}: {type(error).__name__}: {error}"
            print(f"reward server: {problem}; trying again", flush=True)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # not all at once
            delay = min(2 * delay, _LONGEST_DELAY)
