"""The configuration of a run: one typed object, made of a frozen group for every topic.

Functions take the group that they need. Two forms are flat, with the flags' names: `values`, which the run directory's
`config.toml` stores, and `namespace`, which is slime's `args` for functions of users.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

from rltrain.arguments.groups.agents import Agents
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.checkpoint import Checkpoint
from rltrain.arguments.groups.critic import Critic, values_of_critic
from rltrain.arguments.groups.data import Data
from rltrain.arguments.groups.debug import Debug, Profiling, Tracking
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.evaluation import Evaluation, settings_of_set
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.model import Model, Shape
from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.groups.rollout import Rewards, Rollout
from rltrain.arguments.groups.training import Lora, Mtp, Optimizer, Training
from rltrain.arguments.groups.weights import Weights

T = TypeVar("T")
# What slime's flags of these names switch on, and is on in every run here: functions of users find it in `args`.
ALWAYS_ON = {"use_fault_tolerance": True, "balance_data": True}


@dataclass(frozen=True)
class Config:
    """Everything that a run was asked for.

    Attributes:
        custom: what `--custom-config-path` adds: attributes of `args` that no flag has.
        ignored_flags: flags that were given and do nothing here, or are old names of others; without dashes.
    """

    parallel: Parallel = field(default_factory=Parallel)
    engines: Engines = field(default_factory=Engines)
    weights: Weights = field(default_factory=Weights)
    rollout: Rollout = field(default_factory=Rollout)
    rewards: Rewards = field(default_factory=Rewards)
    functions: Functions = field(default_factory=Functions)
    agents: Agents = field(default_factory=Agents)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    algorithm: Algorithm = field(default_factory=Algorithm)
    critic: Critic = field(default_factory=Critic)
    training: Training = field(default_factory=Training)
    lora: Lora = field(default_factory=Lora)
    mtp: Mtp = field(default_factory=Mtp)
    optimizer: Optimizer = field(default_factory=Optimizer)
    model: Model = field(default_factory=Model)
    shape: Shape = field(default_factory=Shape)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    profiling: Profiling = field(default_factory=Profiling)
    debug: Debug = field(default_factory=Debug)
    ignored_flags: list[str] = field(default_factory=list)
    custom: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Config:
        """From flat values by name; a name that no group has is one of `custom`."""
        parts: dict[str, dict[str, Any]] = {name: {} for name in groups()}
        own: dict[str, Any] = {"custom": {}}
        for name, value in values.items():
            if name in places():
                parts[places()[name]][name] = value
            elif name == "ignored_flags":
                own[name] = value
            elif name not in ALWAYS_ON:
                own["custom"][name] = value
        return cls(**{name: kind(**parts[name]) for name, kind in groups().items()}, **own)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Config:
        """From slime's `args`, which a user's function hands to one of ours; they stay its `namespace`."""
        config = cls.from_values(vars(args))
        config.__dict__["namespace"] = args
        return config

    def values(self) -> dict[str, Any]:
        """Every value by name."""
        found: dict[str, Any] = {}
        for name in groups():
            found |= vars(getattr(self, name))
        return found | {"ignored_flags": self.ignored_flags} | self.custom

    @cached_property
    def namespace(self) -> argparse.Namespace:
        """slime's `args`, for functions of users. Made once: what one function sets there, the next one sees."""
        return argparse.Namespace(**ALWAYS_ON, **self.values())

    def of_critic(self) -> Config:
        """The configuration that trains the critic, with everything that functions of users set on `namespace`."""
        changes = values_of_critic(self.critic, self.optimizer.lr, self.checkpoint.save)
        return Config.from_values(vars(self.namespace) | changes)

    def of_eval_set(self, settings: Mapping[str, Any]) -> Config:
        """The configuration for the evaluation of one of `evaluation.eval_datasets`, with the present routers."""
        values = vars(self.namespace)
        return Config.from_values(values | settings_of_set(settings, values))

    def replace(self, **changes: Any) -> Config:
        """With other values, by name, in whichever group they are.

        Raises:
            AttributeError: a name that no group has.
        """
        if unknown := changes.keys() - places().keys():
            raise AttributeError(f"no group has {', '.join(sorted(unknown))}")
        return Config.from_values(self.values() | changes)


def group_of(args: argparse.Namespace, kind: type[T]) -> T:
    """One group, from slime's `args`: for what is called for every sample, where `Config.of` takes too long."""
    values = vars(args)
    names = [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: values[name] for name in names if name in values})


@cache
def groups() -> dict[str, type]:
    """The groups of `Config` by the name that it has for them."""
    hints = typing.get_type_hints(Config)
    return {
        each.name: hints[each.name]
        for each in dataclasses.fields(Config)
        if dataclasses.is_dataclass(hints[each.name])
    }


@cache
def places() -> dict[str, str]:
    """The group of every value."""
    return {each.name: name for name, kind in groups().items() for each in dataclasses.fields(kind)}
