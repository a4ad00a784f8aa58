"""What a push is, whichever way it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rltrain.weights.buckets import NamedTensor, Part

E = TypeVar("E")

FindEngines = Callable[[], Sequence[E]]


@dataclass(frozen=True)
class Update:
    """New weights for the engines.

    Attributes:
        version: the number of rollouts that they were trained on.
        parts: of every tensor, or of those that have changed since the push before.
        keep: a name under which the engines are to keep what they get, because changes to it will be sent; or None.
    """

    version: int
    parts: Iterable[Part]
    keep: str | None = None

    @classmethod
    def of(cls, version: int, tensors: Iterable[NamedTensor]) -> Update:
        """Whole tensors, by name."""
        return cls(version, (Part.whole(name, tensor) for name, tensor in tensors))
