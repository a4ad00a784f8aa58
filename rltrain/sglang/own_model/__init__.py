"""Lets SGLang import the one architecture that an engine serves, in place of all that it knows.

SGLang imports the files of all its models, some 250, when it looks up the class of one: in every rank, and a tenth of
an engine's start on a CPU. A package named in `SGLANG_EXTERNAL_MODEL_PACKAGE` has precedence, and then the files of the
others are imported only if an architecture is not in it. This is such a package: its one module, `entry`, offers what
SGLang itself has for the architecture. So one that it does not know, or that is not looked for here (transformers' own,
another model that drafts), is found, or refused, as ever.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCHITECTURES = "SLURMLIME_ARCHITECTURES"
# Whoever sets one of them wants other classes than SGLang's.
_OF_USERS = ("SGLANG_EXTERNAL_MODEL_PACKAGE", "SGLANG_DISABLED_MODEL_ARCHS")
# How SGLang calls a model's layers for further tokens, which draft for it.
_DRAFTS = ("ForCausalLMNextN", "ForCausalLMMTP", "MTP")


def settings(env: Mapping[str, str], server_args: Mapping[str, Any]) -> dict[str, str]:
    """Variables for an engine with these arguments; none where `env` or the model's directory says otherwise."""
    architecture = _architecture(Path(server_args["model_path"]) / "config.json")
    if architecture is None or any(env.get(name) for name in _OF_USERS):
        return {}
    names = [architecture]
    if server_args.get("speculative_algorithm"):
        names += [architecture.removesuffix("ForCausalLM") + ending for ending in _DRAFTS]
    return {"SGLANG_EXTERNAL_MODEL_PACKAGE": __name__, ARCHITECTURES: " ".join(names)}


def _architecture(config: Path) -> str | None:
    """The first that the file names; None where it can't be read, which SGLang says better."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        name = json.loads(config.read_text())["architectures"][0]
        return name if isinstance(name, str) else None
    return None


def module_of(architecture: str, directory: Path) -> str | None:
    """Name of the file in `directory`, without its ending, whose `EntryClass` has the architecture; None without one.

    Files are read and not imported. They end with that assignment.
    """
    word = re.compile(rf"\b{re.escape(architecture)}\b".encode())
    for file in sorted(directory.glob("*.py")):
        _, assignment, entries = file.read_bytes().rpartition(b"\nEntryClass")
        if assignment and word.search(entries):
            return file.stem
    return None
