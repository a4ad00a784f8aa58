"""Trainer and engines on the same GPUs: who has the memory when, in the order that needs the least of it at a time.

    generating   engines: weights and cache     trainer: nothing
    pushing      engines: weights               trainer: weights
    training     engines: nothing               trainer: weights, gradients, optimizer

Memory is released before it is taken. What the trainer releases is kept in pinned host memory; what the engines release
is lost, but they are sent their weights again. Without a GPU the same calls are made, and free nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch.distributed as dist

from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.megatron.device import HostSwap, used_memory
from rltrain.megatron.ranks import control_group
from rltrain.run.http import HttpError

WEIGHTS, CACHE = "weights", "kv_cache"


class MemoryEngine(Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    url: str
    is_ours: bool  # started by the job

    def pause_generation(self) -> object:
        """Compute nothing more, and keep the requests that there are."""

    def release_memory(self, tag: str) -> object:
        """Give the memory of `weights` or `kv_cache` back."""

    def resume_memory(self, tag: str) -> object:
        """Take it again."""


class SwappedModel(Protocol):
    """What is needed of `rltrain.megatron.training.trained_model.TrainedModel`."""

    weights_swap: HostSwap
    state_swap: HostSwap


class EngineMemory:
    """What the engines that share GPUs with the trainer have given up; rank 0 calls the methods.

    Attributes:
        moves: whether they give up anything (--offload-rollout).
    """

    def __init__(self, engines: Engines, debug: Debug) -> None:
        self.moves = engines.offload_rollout and not debug.debug_train_only
        self.find_engines: Callable[[], Sequence[MemoryEngine]] = tuple
        self._released: dict[str, set[str]] = {WEIGHTS: set(), CACHE: set()}  # URLs

    def release(self, tag: str) -> bool:
        """Have all give up `weights` or `kv_cache`; returns whether one still had it."""
        todo = [each for each in self._engines() if each.url not in self._released[tag]]
        for engine in todo:
            self._release(engine, tag)
        return bool(todo)

    def stop(self) -> bool:
        """Have all that may be computing stop, as only idle ones give up memory, and give up all that they still have.

        One that can't be reached is passed over: it may have died a moment ago, which frees its memory, and must not
        keep the trainer from saving.

        Returns:
            Whether one still had something.
        """
        cache, weights = self._released[CACHE], self._released[WEIGHTS]
        todo = [each for each in self._engines() if each.url not in cache & weights]
        left = [each for each in todo if each.url in cache or _reaches(each, each.pause_generation)]
        for tag in (CACHE, WEIGHTS):
            release = partial(self._release, tag=tag)
            left = [
                each
                for each in left
                if each.url in self._released[tag] or _reaches(each, partial(release, each))
            ]
        return bool(todo)

    def resume(self, tag: str) -> bool:
        """Have those that gave it up take it again; returns whether there were any."""
        # One that was started again in between has never given anything.
        todo = [each for each in self._engines() if each.url in self._released[tag]]
        self._released[tag].clear()
        for engine in todo:
            engine.resume_memory(tag)
        return bool(todo)

    def _release(self, engine: MemoryEngine, tag: str) -> None:
        engine.release_memory(tag)
        self._released[tag].add(engine.url)

    def _engines(self) -> list[MemoryEngine]:
        """Not external ones: they have GPUs of their own."""
        return [each for each in self.find_engines() if each.is_ours]


class Offload:
    """Moves memory to and fro; every method is called by all ranks together, and does nothing where it is done."""

    def __init__(self, flags: Engines, models: Sequence[SwappedModel], engines: EngineMemory) -> None:
        """Move only what --offload-train (of `models`) and --offload-rollout name."""
        moved = models if flags.offload_train else ()
        self._weights = [model.weights_swap for model in moved]
        self._state = [model.state_swap for model in moved]
        self._engines = engines

    def for_training(self) -> None:
        """The trainer has all."""
        self._step("engines gave up their cache", lambda: self._engines.release(CACHE))
        self._step("engines gave up their weights", lambda: self._engines.release(WEIGHTS))
        self._take()

    def for_saving(self) -> None:
        """The trainer has all, also if it is asked to stop while engines generate: they don't go on afterwards."""
        if any(swap.is_out for swap in (*self._weights, *self._state)):
            self._step("engines stopped and gave up all", self._engines.stop)
            self._take()

    def for_push(self, find_engines: Callable[[], Sequence[MemoryEngine]]) -> None:
        """Both have their weights; `find_engines` is asked on rank 0 for the engines that there are, now and later."""
        self._engines.find_engines = find_engines
        self._swap("trainer took its weights", self._weights, back=True)
        self._swap("trainer gave up gradients and optimizer", self._state, back=False)
        self._step("engines took their weights", lambda: self._engines.resume(WEIGHTS))

    def for_generating(self) -> None:
        """The engines have all."""
        self._swap("trainer gave up gradients and optimizer", self._state, back=False)
        self._swap("trainer gave up its weights", self._weights, back=False)
        self._step("engines took their weights", lambda: self._engines.resume(WEIGHTS))
        self._step("engines took their cache", lambda: self._engines.resume(CACHE))

    def _take(self) -> None:
        self._swap("trainer took its weights", self._weights, back=True)
        self._swap("trainer took gradients and optimizer", self._state, back=True)

    def _swap(self, words: str, swaps: Sequence[HostSwap], *, back: bool) -> None:
        todo = [swap for swap in swaps if swap.is_out is back]
        if not todo:
            return
        before = used_memory()
        for swap in todo:
            swap.back() if back else swap.out()
        _say(words, before)

    def _step(self, words: str, move: Callable[[], bool]) -> None:
        """Do it on rank 0, when all ranks have done what comes before; they go on when it is done."""
        if not self._engines.moves:
            return
        dist.barrier(group=control_group())
        before = used_memory()
        if dist.get_rank() == 0 and move():
            _say(words, before)
        dist.barrier(group=control_group())


def _reaches(engine: MemoryEngine, ask: Callable[[], object]) -> bool:
    """Whether the engine does it; else says why not."""
    try:
        ask()
    except (OSError, HttpError, TimeoutError) as error:
        print(f"warning: the engine {engine.url} did not free its GPU memory: {error}", flush=True)
        return False
    return True


def _say(words: str, before: int) -> None:
    if dist.get_rank() == 0:
        print(f"memory: {words}: {before / 2**30:.2f} → {used_memory() / 2**30:.2f} GiB in use", flush=True)
