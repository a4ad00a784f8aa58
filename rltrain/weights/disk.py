"""Weight updates through a shared file system: the trainer writes a directory, every engine reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rltrain.weights.hf_directory import write_hf_directory


class EngineClient(Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    def pause_generation(self) -> object:
        """Hold requests back; those that run keep their tokens and nothing that the old weights computed."""

    def update_weights_from_disk(self, path: str, weight_version: str) -> object:
        """Load new weights, forget what the old ones computed, and report this version from then on."""

    def continue_generation(self) -> object:
        """Let requests go on."""


def push_weights(
    root: Path,
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    template: Path,
    engines: Sequence[EngineClient],
) -> Path:
    """Write `root/v000012`, have every engine load it, and remove the versions before.

    An engine that fails to load ends the update with its error; the others go on generating.

    Returns:
        The directory written.
    """
    directory = root / f"v{version:06d}"
    write_hf_directory(directory, tensors, template)

    def update(engine: EngineClient) -> None:
        engine.pause_generation()
        try:
            engine.update_weights_from_disk(str(directory), str(version))
        finally:
            engine.continue_generation()

    _all_at_once(update, engines)
    for other in root.iterdir():
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)
    return directory


def _all_at_once(call: Callable[[EngineClient], None], engines: Sequence[EngineClient]) -> None:
    if not engines:
        return
    with ThreadPoolExecutor(len(engines)) as pool:
        calls = [pool.submit(call, engine) for engine in engines]
    for finished in calls:  # all of them, also when one failed
        finished.result()
