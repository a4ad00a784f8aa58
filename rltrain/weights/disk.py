"""Weight updates through a shared file system: the trainer writes a directory, every engine reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rltrain.weights.current import EngineClient, current_weights, load_weights, set_current
from rltrain.weights.hf_directory import write_hf_directory


class PushTarget(EngineClient, Protocol):
    """What is needed of `rltrain.sglang.engines.JobEngine`."""

    def has_died(self) -> bool:
        """Whether it is gone for good; one that takes its place loads the current weights by itself."""


def push_weights(
    root: Path,
    version: int,
    tensors: Iterable[tuple[str, Tensor]],
    template: Path,
    find_engines: Callable[[], Sequence[PushTarget]],
) -> Path:
    """Write `root/v000012`, make it the current version, and have every engine load it.

    The version before stays until the next push: an engine that was started again may be reading it. For the same
    reason engines are looked up when the new version is there: one that is not yet to be found will look for itself.
    An engine that fails to load ends the update with its error, unless it has died; the others go on generating.

    Returns:
        The directory written.
    """
    _remove_all_but(current_weights(root), root)
    directory = root / f"v{version:06d}"
    write_hf_directory(directory, tensors, template)
    set_current(directory)

    def update(engine: PushTarget) -> None:
        try:
            load_weights(engine, directory)
        except OSError:  # no answer
            if not engine.has_died():
                raise

    _all_at_once(update, find_engines())
    return directory


def _remove_all_but(kept: Path | None, root: Path) -> None:
    for other in root.glob("*"):
        if other != kept and other.is_dir() and not other.is_symlink():
            shutil.rmtree(other, ignore_errors=True)


def _all_at_once(call: Callable[[PushTarget], None], engines: Sequence[PushTarget]) -> None:
    if not engines:
        return
    with ThreadPoolExecutor(len(engines)) as pool:
        calls = [pool.submit(call, engine) for engine in engines]
    for finished in calls:  # all of them, also when one failed
        finished.result()
