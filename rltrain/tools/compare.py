"""Where two lists of tokens with log-probs part. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """Tokens and the log-prob of each; None where there is none to compare."""

    tokens: list[int]
    log_probs: list[float | None]


@dataclass(frozen=True)
class Comparison:
    """How far two responses agree.

    Attributes:
        same: Tokens that are equal from the beginning on.
        parts_at: The first token that differs, or that only one has; None if they are equal.
        compared: Log-probs of equal tokens that both have.
        largest: The largest difference among these, 0 without any; `at` is its token.
    """

    same: int
    parts_at: int | None
    compared: int
    mean: float
    largest: float
    at: int | None


def compare(recorded: Scored, replayed: Scored) -> Comparison:
    """Compare token by token from the beginning, as far as the tokens are equal."""
    same = 0
    for ours, theirs in zip(recorded.tokens, replayed.tokens, strict=False):
        if ours != theirs:
            break
        same += 1
    parted = same < max(len(recorded.tokens), len(replayed.tokens))
    pairs = zip(recorded.log_probs[:same], replayed.log_probs[:same], strict=True)
    differences = {i: abs(a - b) for i, (a, b) in enumerate(pairs) if a is not None and b is not None}
    at = max(differences, key=lambda i: differences[i]) if differences else None
    return Comparison(
        same=same,
        parts_at=same if parted else None,
        compared=len(differences),
        mean=sum(differences.values()) / len(differences) if differences else 0.0,
        largest=differences[at] if at is not None else 0.0,
        at=at,
    )


def first_turn(tokens: Sequence[int], log_probs: Sequence[float], loss_mask: Sequence[int]) -> Scored:
    """What the model wrote before the first token of a tool: as much as one request can repeat."""
    end = next((i for i, trained in enumerate(loss_mask) if not trained), len(tokens))
    return Scored(list(tokens[:end]), list(log_probs[:end]))
