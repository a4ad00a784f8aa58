"""Rollouts that start before the trainer asks for them, as far as `--max-staleness` allows.

The next rollout can begin while one is generated if that one takes all its prompts at its start.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from rltrain.arguments.groups.functions import DEFAULT_ROLLOUT_FUNCTION, Functions
from rltrain.arguments.groups.rollout import Rollout
from rltrain.sample import Sample

T = TypeVar("T")


class LookAhead(Generic[T]):
    """Rollouts in order, each started when it is asked for, or up to `ahead` versions of the weights before.

    Rollout k is trained on when the weights have version k (the number of rollouts they were trained on), and
    versions only grow. So a rollout that starts with version k - `ahead` or a later one has no token from
    weights older than that; and no more than `ahead` rollouts are ever waiting or under way beside the one
    that is trained on.
    """

    def __init__(
        self, generate: Callable[[int, asyncio.Event], Awaitable[T]], *, ahead: int, end: int
    ) -> None:
        """Make rollouts with `generate(rollout_id, taken)`, none before its time from `end` on.

        `generate` sets `taken` when it will take no more prompts: the next rollout does not start before.
        """
        self._generate, self._ahead, self._end = generate, ahead, end
        self._rollouts: dict[int, asyncio.Task[T]] = {}
        self._asked = -1
        self._version: int | None = None
        self._starter: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    async def restart(self, rollout_id: int) -> None:
        """Give up what is under way; `rollout_id` is the next to start, once weights are there for it."""
        await self.close()
        self._asked, self._version = rollout_id - 1, None
        self._starter = asyncio.create_task(self._start_from(rollout_id))

    async def weights(self, version: int) -> None:
        """The engines have the weights of this version now."""
        async with self._changed:
            self._version = version
            self._changed.notify_all()

    async def get(self, rollout_id: int) -> T:
        """What `generate` made of this rollout, started now if it is not under way; may be asked again."""
        if self._starter is None or (rollout_id < self._asked and rollout_id not in self._rollouts):
            await self.restart(rollout_id)
        async with self._changed:
            self._asked = max(self._asked, rollout_id)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: rollout_id in self._rollouts)
        for old in [each for each in self._rollouts if each < rollout_id]:
            del self._rollouts[old]
        return await asyncio.shield(self._rollouts[rollout_id])

    async def close(self) -> None:
        """Stop everything, and wait until it has stopped."""
        tasks = [task for task in (self._starter, *self._rollouts.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rollouts.clear()
        self._starter = None

    async def _start_from(self, first: int) -> None:
        for rollout_id in itertools.count(first):
            async with self._changed:
                await self._changed.wait_for(lambda: self._may_start(rollout_id))  # noqa: B023 (awaited here)
                taken = asyncio.Event()
                task = asyncio.ensure_future(self._generate(rollout_id, taken))
                task.add_done_callback(lambda _: taken.set())  # noqa: B023 (awaited here)
                self._rollouts[rollout_id] = task
                self._changed.notify_all()
            await taken.wait()

    def _may_start(self, rollout_id: int) -> bool:
        if rollout_id <= self._asked:
            return True
        if not self._ahead or self._version is None or rollout_id >= self._end:
            return False
        return rollout_id - self._ahead <= self._version


def takes_all_at_once(functions: Functions, rollout: Rollout) -> bool:
    """Whether a rollout asks the data source for its prompts once, and gives none back.

    Only when it has them is the next rollout's starting point known. Rollouts of functions of the
    user, and those that sample more than they keep, follow one another.
    """
    return (
        rollout.max_staleness > 0
        and functions.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION
        and rollout.over_sampling_batch_size == rollout.rollout_batch_size
        and not functions.dynamic_sampling_filter_path
        and not rollout.partial_rollout
        and not functions.rollout_all_samples_process_path
    )


class OneTake:
    """A data source for one rollout; as soon as it has handed out all its groups, the state after it is stored."""

    def __init__(self, source: Any, groups: int, rollout_id: int, taken: asyncio.Event) -> None:
        self._source, self._missing, self._rollout_id, self._taken = source, groups, rollout_id, taken

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """The next groups of the data source."""
        groups = self._source.get_samples(num_samples)
        self._missing -= len(groups)
        if self._missing <= 0:
            self._source.save(self._rollout_id)
            self._taken.set()
        return groups
