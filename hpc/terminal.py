"""Text from elsewhere on somebody's terminal: what could steer the terminal is made visible or taken out."""

from __future__ import annotations

import re
import unicodedata

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# Control, format (among them the marks that reverse text), surrogate, private use, line separators.
_STEERING = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def safe_text(text: str) -> str:
    r"""A line without colours; of a line drawn over again (`\r`) its last state; other controls as escapes.

    >>> safe_text("10%\r\x1b[32mdone\x1b[0m\x1b]0;title\x07")
    'done\\x1b]0;title\\x07'
    """
    last = text.rstrip("\r").rpartition("\r")[2]
    return "".join(map(_visible, _COLOUR.sub("", last)))


def _visible(character: str) -> str:
    if character == "\t" or unicodedata.category(character) not in _STEERING:
        return character
    return character.encode("unicode_escape").decode()
