"""What rollouts and evaluations that run at the same time share of the engines."""

from __future__ import annotations

import argparse
import asyncio
from weakref import WeakKeyDictionary

from rltrain.arguments.external import count_external
from rltrain.arguments.fleet import engine_specs, trained_model

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
    served, trained = engine_specs(args), trained_model(args)
    own = sum(spec.model == trained and spec.worker_type != "prefill" for spec in served)
    return args.sglang_server_concurrency * max(1, own + count_external(args))


def abort_lock() -> asyncio.Lock:
    """Held by an evaluation, and by a rollout that aborts all that the engines do: they must not meet."""
    return _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
