"""How long sequences may be where a model computes something else for longer ones, which the trainer does not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Limit:
    """Up to how many tokens of a sequence, prompt and response together, trainer and model are the same.

    Attributes:
        what: What is another beyond, with the entry of `config.json` that says so.
    """

    tokens: int
    what: str


def check_engines_limit(limit: Limit | None, longest: int | None, hf_checkpoint: str) -> None:
    """Refuse engines that may generate sequences beyond the limit.

    Args:
        longest: Tokens of the longest sequence that engines generate; None: they have no limit.
        hf_checkpoint: For the message.

    Raises:
        UserError: names the flag that helps.
    """
    if limit is not None and (longest is None or longest > limit.tokens):
        raise UserError(
            f"{hf_checkpoint}/config.json: {limit.what}. The trainer supports shorter sequences only. Give"
            f" --rollout-max-context-len {limit.tokens} or less."
        )


def check_sequences(limit: Limit | None, lengths: Iterable[int]) -> None:
    """Refuse sequences of so many tokens if one of them is beyond the limit.

    Raises:
        UserError: with the length.
    """
    if limit is not None and (longest := max(lengths, default=0)) > limit.tokens:
        raise UserError(
            f"a sequence has {longest} tokens, and {limit.what}. The trainer has only what comes before. Leave such"
            " samples out of the data, or let the function that generates them stop at --rollout-max-context-len."
        )
