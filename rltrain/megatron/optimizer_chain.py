"""Optimizer states between models with and without expert parallelism.

With it Megatron-core has two optimizers, one for the experts; without it one for everything. Their tensors are stored
by parameter and fit either way, but what is common to a group of parameters (the number of steps, …) is stored by
optimizer. This takes it from where it is.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

# What tells a group from others, beside whether its parameters are experts.
_IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")


def fit_chain(loaded: dict[Any, Any], common: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """The state for `optimizer.load_state_dict`.

    Args:
        loaded: What Megatron-core makes of a checkpoint with another number of optimizers: this one's tensors
            mixed with the other one's common values.
        common: The common values alone, as they were stored.
    """
    stored = _parts(common)
    own = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(stored) == len(own):
        return loaded
    groups = {_identity(group): group for part in reversed(stored) for group in _groups(part)}
    fitted = {}
    for number, each in enumerate(own):
        part = (
            loaded[number]
            if len(own) > 1
            else {key: value for key, value in loaded.items() if not isinstance(key, int)}
        )
        _fill(part, stored[0])
        holder = part if "param_groups" in stored[0] else part["optimizer"]
        # A distributed optimizer keeps no list of parameters with a group, so there may be nothing of its own.
        holder.setdefault("param_groups", [{} for _ in each.param_groups])
        for group, current in zip(holder["param_groups"], each.param_groups, strict=True):
            taken = copy.deepcopy(
                {key: value for key, value in groups[_identity(current)].items() if key != "params"}
            )
            group.update(taken, is_expert_parallel=current["is_expert_parallel"])
        fitted[number] = part
    return fitted if len(own) > 1 else fitted[0]


def _parts(state: dict[Any, Any]) -> list[dict[Any, Any]]:
    numbers = sorted(key for key in state if isinstance(key, int))
    return [state[number] for number in numbers] or [state]


def _groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    return part["param_groups"] if "param_groups" in part else part["optimizer"]["param_groups"]


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _IDENTITY)


def _fill(part: dict[Any, Any], common: dict[Any, Any]) -> None:
    """Add common values that are missing; groups of parameters are filled one by one."""
    for key, value in common.items():
        if isinstance(value, dict):
            _fill(part.setdefault(key, {}), value)
        elif key != "param_groups":
            part.setdefault(key, copy.deepcopy(value))
