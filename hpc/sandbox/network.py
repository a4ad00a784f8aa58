"""Networks of their own for a sandbox's nodes: from each a cable leads to a bridge on this machine, and can be cut.

Takes root. Without this all nodes share the machine's loopback device, and none can be cut off.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from hpc.sandbox.daemons import DaemonError, Daemons
from hpc.sandbox.packages import find_program
from hpc.sandbox.spec import Addresses

INSIDE = "eth0"  # a cable's end in its node


class Network:
    """The bridge and its cables."""

    def __init__(self, daemons: Daemons, addresses: Addresses) -> None:
        self._daemons, self._addresses = daemons, addresses
        self._bridge = "sl-" + "-".join(addresses.network.split(".")[1:])

    def make(self) -> None:
        """Make the bridge.

        Raises:
            DaemonError: the machine does not allow it.
        """
        self._ip("link", "add", "name", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{self._addresses.controller}/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")

    def plug_in(self, index: int, pid: int) -> None:
        """Give a node its cable, once its process `pid` has a network namespace of its own."""
        ours = Path("/proc/self/ns/net").readlink()
        self._daemons.wait_until(lambda: Path(f"/proc/{pid}/ns/net").readlink() != ours, "the node's network")
        cable = self._cable(index)
        with contextlib.suppress(DaemonError):  # of a node that lost its power; the kernel takes its time
            self._ip("link", "delete", cable)
        self._ip("link", "add", "name", cable, "type", "veth", "peer", "name", INSIDE, "netns", str(pid))
        self._ip("link", "set", cable, "master", self._bridge)
        self._ip("link", "set", cable, "up")

    def cut(self, index: int) -> None:
        """Nothing reaches the node, or comes from it; connections are not closed."""
        self._ip("link", "set", self._cable(index), "down")

    def join(self, index: int) -> None:
        """Mend what `cut` has cut."""
        self._ip("link", "set", self._cable(index), "up")

    def remove(self) -> None:
        """Take the bridge away; cables go with their nodes."""
        with contextlib.suppress(DaemonError):
            self._ip("link", "delete", self._bridge)

    def _cable(self, index: int) -> str:
        return f"{self._bridge}-{index}"

    def _ip(self, *words: str) -> None:
        self._daemons.run([find_program("ip"), *words])
