"""What was asked of the cluster, as far as it decides how nodes are shared out (`hpc/split.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.arguments.errors import UserError
from rltrain.arguments.flags import Flags


@dataclass(frozen=True)
class Ask:
    """What was asked for; None where nothing was.

    Attributes:
        engine_size: GPUs of one engine.
        has_engines: False if the job only trains.
    """

    nodes: int | None
    placement: str | None
    colocate: bool
    actor_nodes: int | None
    actor_gpus: int | None
    rollout_gpus: int | None
    engine_size: int
    has_engines: bool


def read_ask(flags: Flags, nodes: int | None, placement: str | None, has_engines: bool) -> Ask:
    """The ask from training flags; `nodes` and `placement` are flags of `submit`.

    Raises:
        UserError: a number that is none, or is not positive.
    """
    return Ask(
        nodes=nodes,
        placement=placement,
        # Without a trainer the engines have every node, as if they shared all with it.
        colocate=any(flags.get(name) is not None for name in ("colocate", "debug-rollout-only")),
        actor_nodes=_number(flags, "actor-num-nodes"),
        actor_gpus=_number(flags, "actor-num-gpus-per-node"),
        rollout_gpus=_number(flags, "rollout-num-gpus"),
        engine_size=_number(flags, "rollout-num-gpus-per-engine") or 1,
        has_engines=has_engines,
    )


def _number(flags: Flags, name: str) -> int | None:
    values = flags.get(name)
    if values is None:
        return None
    try:
        number = int(*values)
    except (ValueError, TypeError):
        raise UserError(f"--{name} {' '.join(values)}: a whole number is needed.") from None
    if number < 1:
        raise UserError(f"--{name} is {number}: it must be at least 1.")
    return number
