"""Which of the weights on disk the engines are to have (the link `current` beside the versions), and how they get them.

Free of torch: the engine role uses it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

_LINK = "current"


class EngineClient(Protocol):
    """What is needed of `rltrain.sglang.adapter.HttpServerEngineAdapter`."""

    def pause_generation(self) -> object:
        """Hold requests back; those that run keep their tokens and nothing that the old weights computed."""

    def update_weights_from_disk(self, path: str, weight_version: str) -> object:
        """Load new weights, forget what the old ones computed, and report this version from then on."""

    def continue_generation(self) -> object:
        """Let requests go on."""


def set_current(directory: Path) -> None:
    """Make `directory`, a complete version, the one that engines are to have."""
    draft = directory.with_name(f".{_LINK}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(directory.name)
    draft.replace(directory.with_name(_LINK))


def current_weights(root: Path) -> Path | None:
    """The directory of the current version; None before the first."""
    link = root / _LINK
    return root / link.readlink() if link.is_symlink() else None


def weight_version(directory: Path) -> int:
    """Number of the version in a directory `v000012`: the rollouts that it was trained on."""
    return int(directory.name.removeprefix("v"))


def load_weights(engine: EngineClient, directory: Path) -> None:
    """Have an engine load a directory that `push_weights` has written; requests that run go on with it."""
    engine.pause_generation()
    try:
        engine.update_weights_from_disk(str(directory), str(weight_version(directory)))
    finally:
        engine.continue_generation()
