"""Which of the versions on disk the engines should have (the link `current` beside them), and how they load it.

Free of torch: the engine role uses it too.
"""

from __future__ import annotations

from pathlib import Path

from rltrain.run.files import replace_link
from rltrain.weights.engine import ServerEngine

_LINK = "current"


def set_current(directory: Path) -> None:
    """Make `directory`, a complete version, the one that engines should have."""
    replace_link(directory.with_name(_LINK), directory.name)


def current_weights(root: Path) -> Path | None:
    """The directory of the current version; None before the first."""
    link = root / _LINK
    return root / link.readlink() if link.is_symlink() else None


def weight_version(directory: Path) -> int:
    """Number of the version in a directory `v000012`: how many rollouts it was trained on."""
    return int(directory.name.removeprefix("v"))


def load_from_disk(engine: ServerEngine, directory: Path) -> None:
    """Have an engine load a version that a push has written; running requests continue with it."""
    engine.pause_generation()
    try:
        engine.update_weights_from_disk(str(directory), str(weight_version(directory)))
    finally:
        engine.continue_generation()
