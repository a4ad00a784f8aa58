"""What SGLang reads: `EntryClass`, the classes of the file that has the architecture. To be imported in an engine."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from sglang.srt import models

from rltrain.sglang.own_model import ARCHITECTURE, module_of


def entries(architecture: str) -> Any:
    """SGLang's classes for it, or none."""
    for directory in models.__path__:
        if name := module_of(architecture, Path(directory)):
            return importlib.import_module(f"{models.__name__}.{name}").EntryClass
    return []


EntryClass = entries(os.environ.get(ARCHITECTURE, ""))
