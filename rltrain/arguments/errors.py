"""The one exception that means: the person who asked can fix this."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one paragraph: what is wrong, where, and what to do."""
