r"""Text that is not ours (a model's, a reward's, a log's) passes here before it is printed, and steers no terminal.

A response may hold escape sequences that set the window's title, clear the screen or hide what stands before them, and
it gets into error messages, reasons and findings. On a terminal such characters are shown as their escapes, `\x1b`.
"""

from __future__ import annotations

import re
import unicodedata

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
# Control, format (among them the marks that reverse text), surrogate, private use, line separators.
_STEERING = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""The text with every character that could steer a terminal as its escape; line ends and tabs stay.

    >>> visible("a\x1b]0;title\x07\nb")
    'a\\x1b]0;title\\x07\nb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def safe_line(text: str) -> str:
    r"""A line without colours; of a line drawn over again (`\r`) its last state; other controls as escapes.

    >>> safe_line("10%\r\x1b[32mdone\x1b[0m\x1b]0;title\x07")
    'done\\x1b]0;title\\x07'
    """
    last = text.rstrip("\r").rpartition("\r")[2]
    return visible(_COLOUR.sub("", last))


def safe_text(text: str) -> str:
    """`safe_line` of every line."""
    return "\n".join(map(safe_line, text.split("\n")))


def _escaped(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _STEERING:
        return character
    return character.encode("unicode_escape").decode()
