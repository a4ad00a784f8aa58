"""A `config.json` as the installed transformers understands it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rltrain.models.families import FAMILIES
from rltrain.run.errors import UserError

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
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, __version__
    except ImportError:
        return None
    family = FAMILIES.get((config.get("architectures") or [""])[0])
    own_code = family.same_as if family else None
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


def _is_newer(written: str, installed: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(written).release[:2] > Version(installed).release[:2]
    except InvalidVersion:
        return False
