"""What SGLang reads: `EntryClass`, the classes of the files that have the architectures. Import it in an engine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang.srt import models

from rltrain.sglang.own_model import ARCHITECTURES, module_of


def entries(architectures: Sequence[str]) -> list[Any]:
    """SGLang's classes in the files that have one of them."""
    found = {module_of(name, Path(directory)) for directory in models.__path__ for name in architectures}
    classes = [
        importlib.import_module(f"{models.__name__}.{name}").EntryClass
        for name in sorted(filter(None, found))
    ]
    return [each for group in classes for each in (group if isinstance(group, list) else [group])]


EntryClass = entries(os.environ.get(ARCHITECTURES, "").split())
