"""Whether the nodes of a cluster can see a run directory, as far as this machine can tell."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from hpc.slurm.facts import ClusterFacts
from rltrain.arguments.errors import UserError

_LOCAL_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_LOCAL_TYPES = ("tmpfs", "ramfs", "devtmpfs")


def check_run_dir(path: Path, facts: ClusterFacts) -> None:
    """Refuse a run directory that can't work.

    Raises:
        UserError: it can't be written, only this machine has it, or sbatch can't say its name.
    """
    if set(str(path)) & set("%\\"):
        raise UserError(
            f"{path}: sbatch has a meaning of its own for % and \\ in paths. Give another --runs-dir."
        )
    above = path
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: you may not write to {above}. Give another --runs-dir.")
    if is_one_machine(facts):
        return
    if place := local_place(path, Path("/proc/mounts").read_text()):
        raise UserError(
            f"{path}: {place} is this machine's own, so the nodes would not see the run. Give a --runs-dir on a file"
            " system that the whole cluster has, such as your home directory."
        )


def is_one_machine(facts: ClusterFacts) -> bool:
    """Whether all nodes are this machine, as in a sandbox."""
    own = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    return all(node.name in own or _is_loopback(node.address) for node in facts.nodes)


def local_place(path: Path, mounts: str) -> str | None:
    """The directory or file system type by which a path belongs to one machine only, or None.

    `mounts` is the text of `/proc/mounts`.
    """
    for place in _LOCAL_PLACES:
        if path.is_relative_to(place):
            return place
    kind = filesystem_type(path, mounts)
    return f"a {kind}" if kind in _LOCAL_TYPES else None


def filesystem_type(path: Path, mounts: str) -> str | None:
    """Type of the file system that a path is on, from the text of `/proc/mounts`."""
    found: tuple[int, str | None] = (-1, None)
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= found[0]:  # of two at one place the later is seen
            found = (len(point), kind)
    return found[1]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
