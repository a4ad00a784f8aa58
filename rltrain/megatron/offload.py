"""Trainer and engines on the same GPUs: who has the memory when, in the order that needs the least of it at a time.

    generating   engines: weights and cache     trainer: nothing
    pushing      engines: weights               trainer: weights
    training     engines: nothing               trainer: weights, gradients, optimizer

Whoever gives goes before whoever takes. What the trainer gives is in pinned host memory meanwhile; what the engines
give is lost, but they are sent their weights again. Without a GPU the same calls are made, and free nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist

from rltrain.megatron.device import HostSwap, used_memory
from rltrain.megatron.distributed import control_group

WEIGHTS, CACHE = "weights", "kv_cache"


class MemoryEngine(Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    url: str
    is_ours: bool  # started by the job

    def release_memory(self, tag: str) -> object:
        """Give the memory of `weights` or `kv_cache` back."""

    def resume_memory(self, tag: str) -> object:
        """Take it again."""


class SwappedModel(Protocol):
    """What is needed of `rltrain.megatron.trained_model.TrainedModel`."""

    weights_swap: HostSwap
    state_swap: HostSwap


class Offload:
    """Moves memory to and fro; every method is called by all ranks together, and does nothing where it is done."""

    def __init__(self, args: argparse.Namespace, models: Sequence[SwappedModel]) -> None:
        """Move only what --offload-train (of `models`) and --offload-rollout name."""
        moved = models if args.offload_train else ()
        self._weights = [model.weights_swap for model in moved]
        self._state = [model.state_swap for model in moved]
        self._moves_engines = args.offload_rollout and not args.debug_train_only
        self._find_engines: Callable[[], Sequence[MemoryEngine]] = tuple  # told at the first push
        self._released: dict[str, set[str]] = {WEIGHTS: set(), CACHE: set()}  # URLs

    def for_training(self) -> None:
        """The trainer has all."""
        self._step("engines gave up their cache", lambda: self._release(CACHE))
        self._step("engines gave up their weights", lambda: self._release(WEIGHTS))
        self._swap("trainer took its weights", self._weights, back=True)
        self._swap("trainer took gradients and optimizer", self._state, back=True)

    def for_push(self, find_engines: Callable[[], Sequence[MemoryEngine]]) -> None:
        """Both have their weights; `find_engines` is asked on rank 0 for the engines that there are, now and later."""
        self._find_engines = find_engines
        self._swap("trainer took its weights", self._weights, back=True)
        self._swap("trainer gave up gradients and optimizer", self._state, back=False)
        self._step("engines took their weights", lambda: self._resume(WEIGHTS))

    def for_generating(self) -> None:
        """The engines have all."""
        self._swap("trainer gave up gradients and optimizer", self._state, back=False)
        self._swap("trainer gave up its weights", self._weights, back=False)
        self._step("engines took their weights", lambda: self._resume(WEIGHTS))
        self._step("engines took their cache", lambda: self._resume(CACHE))

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
        if not self._moves_engines:
            return
        dist.barrier(group=control_group())
        before = used_memory()
        if dist.get_rank() == 0 and move():
            _say(words, before)
        dist.barrier(group=control_group())

    def _engines(self) -> list[MemoryEngine]:
        """Those that share GPUs with the trainer: not external ones."""
        return [each for each in self._find_engines() if each.is_ours]

    def _release(self, tag: str) -> bool:
        todo = [each for each in self._engines() if each.url not in self._released[tag]]
        for engine in todo:
            engine.release_memory(tag)
            self._released[tag].add(engine.url)
        return bool(todo)

    def _resume(self, tag: str) -> bool:
        # One that was started again in between has never given anything.
        todo = [each for each in self._engines() if each.url in self._released[tag]]
        self._released[tag].clear()
        for engine in todo:
            engine.resume_memory(tag)
        return bool(todo)


def _say(words: str, before: int) -> None:
    if dist.get_rank() == 0:
        print(f"memory: {words}: {before / 2**30:.2f} → {used_memory() / 2**30:.2f} GiB in use", flush=True)
