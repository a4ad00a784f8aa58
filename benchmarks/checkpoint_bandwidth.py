"""Saving and loading a checkpoint against a plain write and read of the same bytes, on the same disk.

    python benchmarks/checkpoint_bandwidth.py [--shape 75M]

One rank, fp32 weights with Adam's state. The plain write is one file, written and synced; the plain read reads the
checkpoint's own files once. Both of ours include the checksums. Nothing is written over; what was written is removed
between the rounds. With --async-save what counts is how long training
stands still.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer_step import SHAPES, make_actor, make_batch

from rltrain.megatron.checkpoint.directory import damaged_file
from rltrain.megatron.checkpoint.load import load_checkpoint
from rltrain.megatron.checkpoint.save import SaveOptions, begin_save, save_checkpoint

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="75M")
    parser.set_defaults(samples=8, longest=16, bf16=False)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        actor = make_actor(options, directory)
        actor.train(0, make_batch(options))  # Adam has a state from here on
        state = actor.policy.full_state()
        checkpoint = save_checkpoint(directory / "c", 1, state)
        files = [path for path in checkpoint.iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        content = os.urandom(size)

        def load() -> None:
            damaged_file(checkpoint)
            load_checkpoint(checkpoint, state)

        def stand_still() -> None:
            pending.append(begin_save(directory / "d", 1, state, SaveOptions()).in_background())

        def remove() -> None:
            (directory / "plain").unlink(missing_ok=True)
            shutil.rmtree(directory / "d", ignore_errors=True)

        pending: list[Any] = []
        write, save = race(
            lambda: plain_write(directory / "plain", content),
            lambda: save_checkpoint(directory / "d", 1, state),
            after=remove,
        )
        read, loaded = race(lambda: [path.read_bytes() for path in files], load)
        still = race(stand_still, after=lambda: (pending.pop().finish(), remove()))[0]
    mebibytes = size / 2**20
    print(
        f"checkpoint of {mebibytes:.0f} MiB: saving / plain write = {write / save:.2f} of its speed; ours"
        f" {mebibytes / save:.0f} MiB/s, plain {mebibytes / write:.0f} MiB/s\n"
        f"loading / plain read = {read / loaded:.2f} of its speed; ours {mebibytes / loaded:.0f} MiB/s, plain"
        f" {mebibytes / read:.0f} MiB/s\n"
        f"--async-save: training stands still for {still * 1e3:.0f} ms, {still / save:.2f} of a save"
    )


def plain_write(path: Path, content: bytes) -> None:
    """One file, synced."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def race(*candidates: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> list[float]:
    """Median seconds of each, in turns; `after` runs after each, untimed."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for candidate, taken in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            taken.append(time.perf_counter() - start)
            after()
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
