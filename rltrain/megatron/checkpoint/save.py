"""Writing a checkpoint: while everybody waits, or in the background; and what happens if the disk is full.

The steps are the same both ways. All ranks plan; each rank writes its own files and their checksums, which talks to no
other rank, so it can happen in a forked process; all ranks hear how it went; rank 0 publishes. Whatever goes wrong
is known to every rank (`CheckpointError`), and leaves older checkpoints as they were.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import queue
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import CheckpointException  # a BaseException

from rltrain.arguments.groups.checkpoint import Checkpoint
from rltrain.megatron.checkpoint.directory import (
    checksums_of,
    iteration_directory,
    iteration_of,
    prune,
    publish,
)
from rltrain.megatron.checkpoint.legacy import write_legacy
from rltrain.megatron.checkpoint.state import (
    TrainState,
    sharded_rng_state,
    sharded_tensors,
    sharding,
    state_dict,
    stored_metadata,
)
from rltrain.megatron.device import megatron_scope
from rltrain.megatron.ranks import control_group, first_problem, together
from rltrain.megatron.versions import own_writer, prepare_results_queue, write_common_file
from rltrain.run.files import readable_size

# Kept free while the ranks write, for what rank 0 writes last: a full disk is noticed before that.
_RESERVE_BYTES = 16 << 20


class CheckpointError(Exception):
    """A checkpoint could not be written. Every rank raises it, with the same reason."""


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are written, and which older ones stay; the flags of the same names."""

    ckpt_format: str = "torch_dist"
    save_rng: bool = True
    keep_last: int | None = None
    retain_interval: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SaveOptions:
        """What the flags ask for."""
        return cls(
            checkpoint.ckpt_format,
            not checkpoint.no_save_rng,
            checkpoint.keep_last_k,
            checkpoint.save_retain_interval,
        )

    @classmethod
    def of_companion(cls, checkpoint: Checkpoint) -> SaveOptions:
        """For a critic or a reference: one more stays, until the policy's checkpoint of that step exists."""
        options = cls.of(checkpoint)
        if options.keep_last is None and options.retain_interval is None:
            return options
        return replace(options, keep_last=(options.keep_last or 1) + 1)


def save_checkpoint(
    directory: Path, iteration: int, state: TrainState, options: SaveOptions | None = None
) -> Path:
    """Write a checkpoint; all ranks take part. Returns its directory.

    Raises:
        CheckpointError: it could not be written; nothing is left of it.
    """
    return begin_save(directory, iteration, state, options or SaveOptions()).finish()


@dataclass
class PendingSave:
    """A checkpoint that is being written. All ranks call its methods together.

    Attributes:
        write: Writes this rank's files; talks to no other rank.
        finalize: What all ranks do when everything is written.
        process: What runs `write` in the background; None: nobody has yet.
    """

    final: Path
    temporary: Path
    options: SaveOptions
    write: Callable[[], None]
    finalize: Callable[[], None]
    process: Any = None

    def in_background(self) -> PendingSave:
        """Fork a process that writes; the weights may change from now on."""
        self.process = multiprocessing.get_context("fork").Process(target=self.write, daemon=False)
        self.process.start()
        return self

    def is_written(self) -> bool:
        """Whether this rank's files are."""
        return self.process is None or not self.process.is_alive()

    def finish(self) -> Path:
        """Wait until it is written on all ranks, and give it its name.

        Raises:
            CheckpointError: it could not be written; nothing is left of it.
        """
        try:
            if self.process is None:
                together(self.write, CheckpointError)
            else:
                together(self._join, CheckpointError)
            _on_rank_0(lambda: _reserve(self.temporary).unlink())
            self._finalize()
            _on_rank_0(self._publish)
        except CheckpointError as error:
            _remove(self.temporary)
            raise CheckpointError(f"{self.final.name} was not saved: {error}") from error
        return self.final

    def _join(self) -> None:
        self.process.join()
        if self.process.exitcode != 0:
            raise OSError(f"the writing process ended with exit code {self.process.exitcode}")

    def _finalize(self) -> None:
        try:
            with megatron_scope():
                self.finalize()
        except (Exception, CheckpointException) as error:  # megatron-core raises on every rank alike
            raise CheckpointError(_innermost(error)) from error

    def _publish(self) -> None:
        sums: dict[str, int] = {}
        for path in self.temporary.glob(".sums-*.json"):
            sums |= json.loads(path.read_text())
            path.unlink()
        if self.options.ckpt_format == "torch_dist":
            write_common_file(self.temporary)
        publish(self.temporary, self.final, sums)
        prune(self.final.parent, self.options.keep_last, self.options.retain_interval)


def begin_save(directory: Path, iteration: int, state: TrainState, options: SaveOptions) -> PendingSave:
    """Plan a checkpoint; all ranks take part. Nothing but small files is written yet.

    Raises:
        CheckpointError: the directory can't be written, or the disk has too little space.
    """
    final = iteration_directory(directory, iteration)
    temporary = directory / f".{final.name}.tmp"
    content = state_dict(state, sharding(state.partly_trained), is_loading=False)
    content["iteration"] = iteration
    needed = _size(content)
    try:
        _on_rank_0(lambda: _make_room(temporary, needed))
        if options.ckpt_format == "torch":
            write = lambda: write_legacy(temporary, iteration, state, save_rng=options.save_rng)  # noqa: E731
            return PendingSave(final, temporary, options, write, lambda: None)
        return _begin_torch_dist(final, temporary, content, state, options)
    except CheckpointError as error:
        _remove(temporary)
        raise CheckpointError(f"{final.name} was not saved: {error}") from error


def _begin_torch_dist(
    final: Path, temporary: Path, content: dict[str, Any], state: TrainState, options: SaveOptions
) -> PendingSave:
    if options.save_rng:
        content["rng"] = sharded_rng_state()
    prepare_results_queue()
    strategy: Any = get_default_save_sharded_strategy()
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        # Data parallel ranks hold the same weights: each writes a share of them.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    with megatron_scope():
        request = dist_checkpointing.save(
            content,
            str(temporary),
            sharded_strategy=strategy,
            async_sharded_save=True,
            content_metadata=stored_metadata(state, sharding(state.partly_trained), has_rng=options.save_rng),
            **own_writer(),
        )
        arguments = list(request.async_fn_args)
        if request.async_fn is not None and request.preload_fn:
            arguments[1] = request.preload_fn()  # in host memory from here on

    def write() -> None:
        if request.async_fn is None:
            return
        _write_buckets(request.async_fn, *arguments)
        files = [path for path in (Path(path) for path, _, _ in arguments[1]) if path.exists()]
        sums = dict(zip((path.name for path in files), checksums_of(files), strict=True))
        (temporary / f".sums-{dist.get_rank()}.json").write_text(json.dumps(sums))

    def finalize() -> None:
        for step in request.finalize_fns:
            step()

    return PendingSave(final, temporary, options, write, finalize)


def _write_buckets(write: Callable[..., None], rank: int, buckets: list[Any], results: Any) -> None:
    """Megatron-core's `write`, whose outcome goes into the queue `results`: also when it failed."""
    while not results.empty():  # of a save that failed on another rank
        results.get()
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gc.disable()
    try:
        write(rank, buckets, outcome)
        result = outcome.get()
        if isinstance(result, Exception):
            # The error's frames hold a buffer in a cycle; Python 3.12.1 crashes when it collects that.
            gc.freeze()
    finally:
        gc.enable()
    results.put(result)


def _on_rank_0(call: Callable[[], Any]) -> None:
    together(lambda: call() if dist.get_rank() == 0 else None, CheckpointError)


def _make_room(temporary: Path, needed: int) -> None:
    """An empty directory on a disk with enough space, as far as the system tells (it does not tell of quotas)."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    free = shutil.disk_usage(temporary).free
    if free < needed + _RESERVE_BYTES:
        raise OSError(
            f"the disk is full: it takes {readable_size(needed)}, and {temporary.parent} has {readable_size(free)} free"
        )
    with _reserve(temporary).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)


def _reserve(temporary: Path) -> Path:
    """Beside the directory, which Megatron-core wants to be empty."""
    return temporary.with_name(f"{temporary.name}.reserve")


def _remove(temporary: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        _reserve(temporary).unlink(missing_ok=True)


def _size(content: dict[str, Any]) -> int:
    """Bytes of all ranks' tensors, each counted once."""
    own = sum(
        tensor.data.numel() * tensor.data.element_size()
        for tensor in sharded_tensors(content)
        if tensor.data is not None and is_main_replica(tensor.replica_id)
    )
    total = [0] * dist.get_world_size()
    dist.all_gather_object(total, own, group=control_group())
    return sum(total)


def _innermost(error: BaseException) -> str:
    """What happened first: megatron-core wraps it several times."""
    failures = getattr(error, "failures", None)
    if failures:
        return str(next(iter(failures.values()))[0])
    return f"{type(error).__name__}: {error}"


class CheckpointWriter:
    """Saves a run's checkpoints one after the other, and goes on where one could not be written.

    With --async-save a checkpoint is written while training goes on; it counts when `poll` or `wait` has finished it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        on_saved: Callable[[int, Path], None],
        on_failed: Callable[[int, str], None],
    ) -> None:
        """`on_saved(iteration, directory)` and `on_failed(iteration, reason)` are called on every rank."""
        assert checkpoint.save is not None
        self._directory, self._options = Path(checkpoint.save), SaveOptions.of(checkpoint)
        self._in_background = checkpoint.async_save
        self._on_saved, self._on_failed = on_saved, on_failed
        self._pending: PendingSave | None = None
        self.unsaved: str | None = None  # why the newest checkpoint could not be written, if so

    def save(
        self, iteration: int, state: TrainState, before: Callable[[int], None] | None = None
    ) -> Path | None:
        """Save, or begin to. Returns the checkpoint's directory; None if it could not be written.

        Args:
            before: Saves what belongs to this checkpoint, which is not written if that fails.
        """
        self.wait()
        try:
            if before is not None:
                before(iteration)
            self._pending = begin_save(self._directory, iteration, state, self._options)
        except CheckpointError as error:
            self._failed(iteration, error)
            return None
        if self._in_background:
            return self._pending.in_background().final
        return self.wait()

    def poll(self) -> None:
        """Finish a checkpoint whose files have been written on every rank meanwhile."""
        if self._pending is not None and not first_problem(None if self._pending.is_written() else "writing"):
            self.wait()

    def wait(self) -> Path | None:
        """Finish the checkpoint that is being written, if there is one. Returns it if it was saved."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            checkpoint = pending.finish()
        except CheckpointError as error:
            self._failed(iteration_of(pending.final), error)
            return None
        self.unsaved = None
        self._on_saved(iteration_of(checkpoint), checkpoint)
        return checkpoint

    def _failed(self, iteration: int, error: CheckpointError) -> None:
        if dist.get_rank() == 0:
            print(f"warning: {error}; older checkpoints are unchanged, and the run continues", flush=True)
        self.unsaved = str(error)
        self._on_failed(iteration, self.unsaved)
