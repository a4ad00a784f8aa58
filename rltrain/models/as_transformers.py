"""A `config.json` as the installed transformers understands it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rltrain.models.families import FAMILIES
from rltrain.run.errors import UserError
from rltrain.run.files import read_json, replace_text

# Of transformers 4, or of other tools; transformers 5 reads or ignores them.
_OLD = {"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts", "sliding_window",
        "_name_or_path", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset", "head_dim"}  # fmt: skip


def standard_config(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All entries, with the defaults of what `config.json` lacks, in one style; None without transformers.

    Args:
        config: The parsed `config.json` of `directory`.

    Raises:
        UserError: transformers can't read it, or is older than the one that wrote it and lacks entries of it.
    """
    from rltrain.packages import quick_distributions

    try:
        with quick_distributions():
            from transformers import CONFIG_MAPPING, AutoConfig, __version__
    except ImportError:
        return None
    own_code = _same_as(config)
    written = config.get("transformers_version")
    by = f"{directory}/config.json" + (f" (of transformers {written})" if written else "")
    try:
        if own_code:
            found = CONFIG_MAPPING[own_code].from_dict({**config, "model_type": own_code, "auto_map": None})
        else:
            found = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of many kinds, from many places
        problem = str(error).strip().splitlines()[0:1] or [type(error).__name__]
        raise UserError(f"transformers {__version__} can't use {by}: {problem[0]}") from error
    if isinstance(written, str) and _is_newer(written, __version__):
        known = type(found)().to_dict().keys() | _OLD
        if unknown := sorted(config.keys() - known):
            raise UserError(
                f"{by} has {', '.join(unknown)}, which the installed transformers {__version__} does not know."
                f" Install transformers {written}."
            )
    standard: dict[str, Any] = found.to_dict()
    return {**standard, "model_type": config["model_type"]} if own_code else standard


def kept_standard_config(directory: Path, config: Mapping[str, Any], file: Path) -> dict[str, Any] | None:
    """As `standard_config`, computed once a run, because importing transformers is a third of a rank's import time.

    Args:
        file: Where the answer is kept for the attempts that follow. It holds for the bytes of `config.json` and the
            versions and source of what made it; for others it is made anew.

    Raises:
        UserError: as `standard_config`, in every attempt.
    """
    origin = _origin(directory, config)
    if origin is not None and (kept := _kept(file, origin)) is not None:
        return kept
    found = standard_config(directory, config)
    if origin is not None and found is not None:
        # On a full disk, or with values that JSON does not have, the next attempt asks again.
        with contextlib.suppress(OSError, TypeError, ValueError):
            replace_text(file, json.dumps({"origin": origin, "config": found}))
    return found


def _origin(directory: Path, config: Mapping[str, Any]) -> dict[str, str | None] | None:
    """What `standard_config` depends on; None where that can't be told."""
    try:
        versions = {name: metadata.version(name) for name in ("slurmlime", "transformers")}
        files = (directory / "config.json", Path(__file__))  # a checkout of ours changes under one version
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    except (metadata.PackageNotFoundError, OSError):
        return None
    if "dev" in versions["transformers"]:  # a checkout, which changes under one version
        return None
    return {**versions, **hashes, "same_as": _same_as(config)}


def _same_as(config: Mapping[str, Any]) -> str | None:
    """The `model_type` that transformers has for a model that comes with code of its own."""
    family = FAMILIES.get((config.get("architectures") or [""])[0])
    return family.same_as if family else None


def _kept(file: Path, origin: dict[str, str | None]) -> dict[str, Any] | None:
    """What is kept in the file, if it was made of the same."""
    with contextlib.suppress(OSError):  # what can't be read is made anew
        known = read_json(file)
        if (
            isinstance(known, dict)
            and known.get("origin") == origin
            and isinstance(known.get("config"), dict)
        ):
            return dict(known["config"])
    return None


def _is_newer(written: str, installed: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(written).release[:2] > Version(installed).release[:2]
    except InvalidVersion:
        return False
