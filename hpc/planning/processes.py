"""The processes of a job, as a plan names them. Imports no flags: the supervisor is unpickled with them, and starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAIN_ROLE = "trainer"


@dataclass(frozen=True)
class Placement:
    """Where the tasks of a role run.

    Attributes:
        component: number of the heterogeneous job's component; 0 in other jobs.
        nodes: positions in the component's list of nodes.
        tasks_per_node: on each of them.
        gpus: the first GPU and the number of GPUs on each node that these tasks share; None to see none.
    """

    component: int
    nodes: tuple[int, ...]
    tasks_per_node: int = 1
    gpus: tuple[int, int] | None = None


@dataclass(frozen=True)
class RoleProcess:
    """One process of the job, or several that are started together and end together.

    Attributes:
        index: of the first process.
        env: on top of what every role gets.
        count: number of processes.
        spans: whether they are the parts of one engine, a node each.
        placement: None on this machine.
    """

    role: str
    index: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    count: int = 1
    spans: bool = False
    placement: Placement | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the processes in logs and messages, for example `engine-0`."""
        if self.spans:
            first = f"{self.role}-{self.index}"
            return (first, *(f"{first}.node{i}" for i in range(1, self.count)))
        return tuple(f"{self.role}-{self.index + i}" for i in range(self.count))

    @property
    def name(self) -> str:
        """All of them in one word."""
        if self.count == 1 or self.spans:
            return self.names[0]
        return f"{self.role}-[{self.index}-{self.index + self.count - 1}]"

    def index_of(self, name: str) -> int:
        """Index of the process, or engine, that has this name."""
        return self.index + (self.names.index(name) if name in self.names and not self.spans else 0)


@dataclass(frozen=True)
class JobPlan:
    """The processes of a job. The run is over when its trainers are.

    Attributes:
        layout: `local`, or where a Slurm job has its processes: `het`, `plain`, `colocated`.
    """

    processes: tuple[RoleProcess, ...]
    layout: str = "local"

    @property
    def gpus(self) -> int | None:
        """How many of this machine's GPUs the processes see; None for a Slurm job, because Slurm knows it."""
        if self.layout != "local":
            return None
        seen = {gpu for each in self.processes for gpu in each.env.get("CUDA_VISIBLE_DEVICES", "").split(",")}
        return len(seen - {""})

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles in each component of the job."""
        found: dict[int, list[str]] = {}
        for process in self.processes:
            component = found.setdefault(process.placement.component if process.placement else 0, [])
            if process.role not in component:
                component.append(process.role)
        return tuple("+".join(found[component]) for component in sorted(found))
