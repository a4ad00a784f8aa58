"""A reward that a server computes: `--rm-type remote_rm --rm-url URL`."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import aiohttp

from rltrain.run.http import RETRIED, pauses
from rltrain.sample import Sample

_FIRST_PAUSE = 0.1


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
    return await post_json(args.rm_url, payload)


async def post_json(url: str, payload: dict[str, Any]) -> Any:
    """The answer of a server outside the job; one that is away or overloaded is asked again, ever more slowly.

    Raises:
        RuntimeError: it refused the request.
    """
    waits = pauses(_FIRST_PAUSE)
    async with aiohttp.ClientSession(trust_env=False) as session:
        while True:
            try:
                async with session.post(url, json=payload) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    problem = f"{url}: {response.status} {(await response.text())[:500].strip()}"
                    if response.status not in RETRIED:
                        raise RuntimeError(problem)
            except aiohttp.ClientConnectionError as error:
                problem = f"{url}: {type(error).__name__}: {error}"
            print(f"reward server: {problem}; trying again", flush=True)
            await asyncio.sleep(next(waits))
