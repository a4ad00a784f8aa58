"""What a trainer rank spends its time and memory on: torch's traces, for Perfetto, and histories of its memory."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rltrain.arguments.groups.debug import Profiling, Tracking
from rltrain.megatron.device import use_cuda
from rltrain.run.errors import UserError
from rltrain.run.role import RoleContext

# Allocations and releases that torch remembers: about what a step of a large model makes.
_HISTORY_ENTRIES = 1_000_000


class Profiler:
    """Writes what --use-pytorch-profiler and --record-memory-history ask for, of this rank."""

    def __init__(self, profiling: Profiling, tracking: Tracking, context: RoleContext) -> None:
        """Nothing is recorded yet."""
        self._profiling, self._context = profiling, context
        self._traces = Path(tracking.tensorboard_dir or context.layout.profile)
        ranks = profiling.profile_ranks
        self._is_asked = ranks is None or context.index in ranks
        self._seen = 0  # rollouts of this attempt
        self._rollout_id: int | None = None  # that is being trained on, if it is profiled
        self._is_tracing = False
        self._memory: MemoryRecorder | None = None

    @contextmanager
    def rollout(self, rollout_id: int) -> Iterator[None]:
        """Enter it round the training on a rollout: target `train_overall`."""
        profiling, number = self._profiling, self._seen
        self._seen += 1
        is_due = profiling.profile_step_start <= number < profiling.profile_step_end
        if profiling.use_pytorch_profiler and self._is_asked and is_due:
            self._rollout_id = rollout_id
        with self.part("train_overall"):
            yield
        self._rollout_id = None
        if self._seen == profiling.memory_snapshot_num_steps:
            self._end_memory()

    @contextmanager
    def part(self, target: str) -> Iterator[None]:
        """Enter it round a part of that; inside of a part that is traced it is only marked."""
        if self._rollout_id is None:
            yield
        elif self._is_tracing:
            with record_function(target):
                yield
        elif target not in self._profiling.profile_target:
            yield
        else:
            with self._traced(self._file(target)), record_function(target):
                yield

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Record this rank's memory in here; it is written at the end, or when memory runs out.

        Raises:
            UserError: it can't be recorded on this machine.
        """
        if not (self._profiling.record_memory_history and self._is_asked):
            yield
            return
        directory = Path(self._profiling.memory_snapshot_dir or self._context.layout.profile)
        # A restart must not replace what the attempt that ran out of memory has written.
        name = f"memory_attempt_{self._context.attempt}_rank_{self._context.index}"
        self._memory = start_recorder(self._profiling, directory / name)
        try:
            yield
        finally:
            self._end_memory()

    def _end_memory(self) -> None:
        if self._memory is not None:
            recorder, self._memory = self._memory, None
            print(f"the history of memory is in {recorder.finish()}", flush=True)

    def _file(self, target: str) -> Path:
        # TensorBoard's plugin finds traces by this ending.
        name = f"{target}_rank_{self._context.index}.{self._rollout_id}.pt.trace.json.gz"
        return self._traces / name

    @contextmanager
    def _traced(self, path: Path) -> Iterator[None]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if use_cuda() else [])]
        self._is_tracing = True
        try:
            with profile(
                activities=activities,
                record_shapes=True,
                profile_memory=True,
                with_stack=True,
                with_flops=True,
            ) as trace:
                yield
        finally:
            self._is_tracing = False
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        trace.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
        print(f"a trace of {path.name.partition('_rank_')[0]} is in {path}", flush=True)


class MemoryRecorder(Protocol):
    """Records until `finish` is called."""

    def finish(self) -> Path:
        """Stop; returns the file."""


def start_recorder(profiling: Profiling, path: Path) -> MemoryRecorder:
    """Begin to record into a file: `path` with the ending of --memory-recorder.

    Raises:
        UserError: it can't be done on this machine.
    """
    if profiling.memory_recorder == "torch" and not use_cuda():
        raise UserError(
            "--record-memory-history: torch records the memory of GPUs, and this trainer has none. Leave it out, or"
            " record host memory with --memory-recorder memray."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return TorchMemory(path) if profiling.memory_recorder == "torch" else MemrayMemory(path)


class TorchMemory:
    """Every allocation on this rank's GPU, with its stack: for pytorch.org/memory_viz."""

    def __init__(self, path: Path) -> None:
        """Begin."""
        self._path = path.with_suffix(".pickle")
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES, stacks="all")

    def finish(self) -> Path:
        """Write what is remembered, and forget it."""
        torch.cuda.memory._dump_snapshot(str(self._path))
        torch.cuda.memory._record_memory_history(enabled=None)
        return self._path


class MemrayMemory:
    """Every allocation in host memory, with its stack, written as it is made: for `memray flamegraph`."""

    def __init__(self, path: Path) -> None:
        """Begin.

        Raises:
            UserError: the package is not installed.
        """
        try:
            memray: Any = importlib.import_module("memray")
        except ImportError as error:
            raise UserError(
                f"--memory-recorder memray needs a package ({error}): pip install memray"
            ) from None
        self._path = path.with_suffix(".memray")
        self._path.unlink(
            missing_ok=True
        )  # of this attempt's trainer before a restart; memray replaces no file
        self._tracker = memray.Tracker(str(self._path), native_traces=True)
        self._tracker.__enter__()

    def finish(self) -> Path:
        """Close the file."""
        self._tracker.__exit__(None, None, None)
        return self._path
