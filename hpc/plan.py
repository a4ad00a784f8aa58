"""Which processes a job consists of: a pure function of the training flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

MAIN_ROLE = "trainer"

_PROGRAMS = {
    "router": "rltrain.sglang.router",
    "engine": "rltrain.sglang.engine",
    "rollout": "rltrain.rollout",
    MAIN_ROLE: "rltrain.train",
}


@dataclass(frozen=True)
class RoleProcess:
    """One process of the job."""

    role: str
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # on top of what every role gets

    @property
    def name(self) -> str:
        """How logs and messages call it, for example `engine-0`."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class JobPlan:
    """The processes of a job. The run is over when its trainers are."""

    processes: tuple[RoleProcess, ...]


def make_plan(args: argparse.Namespace, python: str = sys.executable) -> JobPlan:
    """Plan a job on one machine from resolved training flags."""
    engines = 0 if args.debug_train_only else args.rollout_num_gpus // args.rollout_num_gpus_per_engine
    trainers = args.actor_num_nodes * args.actor_num_gpus_per_node
    processes = [
        *_role("router", min(engines, 1), python),
        *_role("engine", engines, python),
        *_role("rollout", 1, python),
        *_role(MAIN_ROLE, trainers, python),
    ]
    return JobPlan(tuple(processes))


def _role(role: str, count: int, python: str) -> list[RoleProcess]:
    argv = (python, "-m", _PROGRAMS[role])
    return [RoleProcess(role, index, argv, _role_env(role, index, count)) for index in range(count)]


def _role_env(role: str, index: int, count: int) -> dict[str, str]:
    if role != MAIN_ROLE:
        return {}
    rank, world = str(index), str(count)
    return {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
