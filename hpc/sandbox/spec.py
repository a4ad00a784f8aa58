"""The shape of a sandbox (chosen by its user) and its addresses (chosen when it starts)."""

from __future__ import annotations

import json
import random
import re
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from rltrain.run.errors import UserError

MAX_NODES = 200  # they are numbered from 10 in the last byte of their address
BACKUP = "backup"  # host name of a second slurmctld
# Below the kernel's usual range for outgoing connections, so that none of those takes a port we have chosen.
_PORTS = range(10_000, 32_000)


@dataclass(frozen=True)
class ClusterSpec:
    """The shape of the cluster.

    Attributes:
        nodes: GPU nodes, `node1` to `nodeN`.
        gpus: GPUs of each of them; 0 for none.
        gpu_types: the GPU nodes are shared out evenly among these types, in order.
        cpu_nodes: nodes without GPUs, `cpu1` to `cpuN`, in the partition `cpu`.
        cpus: CPUs that each node claims to have; nothing stops jobs from using more.
        memory_mb: memory that each node claims to have, MiB.
        accounting: run slurmdbd and MariaDB, so that sacct answers.
        extra_conf: lines added to slurm.conf.
        networks: each node has a network of its own, so that it can be cut off. Takes root; without accounting.
        backup: a second slurmctld takes over when the first is gone, after ten seconds; without networks.
    """

    nodes: int = 6
    gpus: int = 4
    gpu_types: tuple[str, ...] = ("h100", "a100")
    cpu_nodes: int = 1
    cpus: int = 16
    memory_mb: int = 64_000
    accounting: bool = False
    extra_conf: str = ""
    networks: bool = False
    backup: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that slurm.conf can't say."""
        if self.nodes < 1 or self.cpu_nodes < 0 or len(self.node_names) > MAX_NODES:
            raise UserError(f"a sandbox has 1 to {MAX_NODES} nodes, not {self.nodes} + {self.cpu_nodes}.")
        if self.gpus < 0 or self.cpus < 1 or self.memory_mb < 1:
            raise UserError("a node has at least one CPU, some memory, and no fewer than 0 GPUs.")
        if self.networks and self.accounting:
            raise UserError("a sandbox whose nodes have networks of their own has no accounting.")
        if self.networks and self.backup:
            raise UserError("a sandbox whose nodes have networks of their own has one slurmctld.")
        if self.gpus and not all(re.fullmatch(r"[a-z][a-z0-9_]*", kind) for kind in self.gpu_types or ("",)):
            raise UserError(f"GPU types are words like h100, not {','.join(self.gpu_types) or 'nothing'}.")

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "gpu_types": tuple(fields["gpu_types"])})

    @property
    def gpu_node_names(self) -> list[str]:
        """Names of the nodes with GPUs (or that would have them)."""
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    @property
    def node_names(self) -> list[str]:
        """Names of all nodes."""
        return self.gpu_node_names + [f"cpu{i}" for i in range(1, self.cpu_nodes + 1)]

    def gpu_type(self, node: str) -> str | None:
        """Type of a node's GPUs, None if it has none."""
        if node not in self.gpu_node_names or not self.gpus:
            return None
        return self.gpu_types[self.gpu_node_names.index(node) * len(self.gpu_types) // self.nodes]


@dataclass(frozen=True)
class Addresses:
    """Where the daemons listen.

    Attributes:
        network: first three bytes of the nodes' addresses; every sandbox has its own.
        first_port: slurmctld's; slurmdbd's is the next one, then one for each node's slurmd.
        has_backup: there are two slurmctlds, told apart by their host names.
    """

    network: str
    first_port: int
    has_backup: bool = False

    @property
    def controller(self) -> str:
        """IPv4 address of slurmctld: this machine's, as the nodes see it."""
        return "127.0.0.1" if self.network.startswith("127.") else f"{self.network}.1"

    @property
    def controller_name(self) -> str:
        """Host name of slurmctld, which it listens on: this machine's, or one that is ours where it must be another."""
        return "localhost" if self.controller == "127.0.0.1" and not self.has_backup else "controller"

    @property
    def backup(self) -> str:
        """IPv4 address of a second slurmctld."""
        return f"{self.network}.2"

    @property
    def slurmctld_port(self) -> int:
        """On `controller`, and on `backup`."""
        return self.first_port

    @property
    def slurmdbd_port(self) -> int:
        """On 127.0.0.1."""
        return self.first_port + 1

    def slurmd_port(self, index: int) -> int:
        """Port of the slurmd of the node with this number, from 0."""
        return self.first_port + 2 + index

    def node(self, index: int) -> str:
        """IPv4 address of the node with this number, from 0."""
        return f"{self.network}.{10 + index}"


def choose_addresses(nodes: int, networks: bool = False, backup: bool = False) -> Addresses:
    """A network and a run of free TCP ports for a cluster of `nodes` nodes.

    The network is below 127/8, which all share; with `networks` below 198.18/15, which is for tests (RFC 2544).
    """
    chance = random.SystemRandom()  # two sandboxes must differ whatever seed their owners have set
    network = f"127.{chance.randint(1, 250)}.{chance.randint(0, 250)}"
    if networks:
        network = f"198.{chance.randint(18, 19)}.{chance.randint(0, 250)}"
    for _ in range(200):
        first = chance.randrange(_PORTS.start, _PORTS.stop - nodes - 2)
        if all_free(range(first, first + nodes + 2)):
            return Addresses(network, first, backup)
    raise OSError(f"no {nodes + 2} consecutive free TCP ports between {_PORTS.start} and {_PORTS.stop}")


def all_free(ports: range) -> bool:
    """Whether every one of these TCP ports can be bound on all addresses."""
    with ExitStack() as stack:
        for port in ports:
            try:
                stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                return False
    return True
