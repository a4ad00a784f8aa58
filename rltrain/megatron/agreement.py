"""All ranks go on, or all give up: what one of them alone has noticed is told to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from rltrain.megatron.distributed import control_group, on_rank_0

T = TypeVar("T")


class TrainerRanks:
    """See `rltrain.weights.sharing.Ranks`."""

    def __init__(self) -> None:
        self.number = dist.get_rank()
        self._count, self._group = dist.get_world_size(), control_group()

    def gather(self, value: T) -> list[T]:
        """See `Ranks.gather`."""
        if self._count == 1:
            return [value]
        gathered: list[T | None] | None = [None] * self._count if self.number == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self._group)
        return gathered or []  # type: ignore[return-value]

    def tell(self, value: T) -> T:
        """See `Ranks.tell`."""
        return on_rank_0(lambda: value)


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem, the same text on every rank; None if no rank has one."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control_group())
    found = [(rank, each) for rank, each in enumerate(problems) if each is not None]
    if not found:
        return None
    rank, text = found[0]
    return text if len(problems) == 1 else f"{text} (rank {rank})"


def together(call: Callable[[], T], failure: Callable[[str], Exception]) -> T:
    """The result of `call`, which every rank makes on its own and which must not talk to other ranks.

    Raises:
        Exception: what `failure` makes of the first problem, on every rank, if `call` raised `OSError` on any.
    """
    result, problem = None, None
    try:
        result = call()
    except OSError as error:
        problem = f"{type(error).__name__}: {error}"
    found = first_problem(problem)
    if found is not None:
        raise failure(found)
    return result  # type: ignore[return-value]
