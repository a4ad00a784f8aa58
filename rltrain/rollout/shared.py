"""What rollouts and evaluations that run at the same time share of the engines."""

from __future__ import annotations

import argparse
import asyncio
from weakref import WeakKeyDictionary

_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = WeakKeyDictionary()
_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def training_slots(args: argparse.Namespace) -> asyncio.Semaphore:
    """A place for each request that may be in flight, `--sglang-server-concurrency` an engine, for all rollouts.

    Who came first is served first, so the rollout that is trained on next is not held up by those after it.
    """
    count = slot_count(args)
    return _slots.setdefault(asyncio.get_running_loop(), {}).setdefault(count, asyncio.Semaphore(count))


def slot_count(args: argparse.Namespace) -> int:
    """How many requests may be in flight."""
    return args.sglang_server_concurrency * (args.rollout_num_gpus // args.rollout_num_gpus_per_engine)


def abort_lock() -> asyncio.Lock:
    """Held by an evaluation, and by a rollout that aborts all that the engines do: they must not meet."""
    return _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
