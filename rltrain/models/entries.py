"""Numbers in a `config.json`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rltrain.run.errors import UserError


def whole_number(config: Mapping[str, Any], key: str, least: int = 1) -> int:
    """An entry of a `config.json` that counts something.

    Raises:
        UserError: it is missing, another kind of value, or below `least`.
    """
    value = config.get(key)
    if value is None:
        raise UserError(f"the model's config.json lacks {key}.")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(
            f"the model's config.json has {key} {value!r}: it must be a whole number above {least - 1}."
        )
    return value


def number(value: Any, name: str) -> float:
    """A value above 0.

    Raises:
        UserError: it is another one, or no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"the model's config.json has {name} {value!r}: it must be a number above 0.")
    return float(value)
