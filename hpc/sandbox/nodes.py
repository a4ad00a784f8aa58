"""The command line that runs one node: slurmd in namespaces of its own."""

from __future__ import annotations

import os
import shlex

from hpc.sandbox.daemons import DaemonError, Daemons
from hpc.sandbox.layout import Layout
from hpc.sandbox.packages import find_program

# The shell is the node's process 1 and reaps what jobs leave behind. It ends with slurmd, and everything
# in the node with it. Nodes share the machine's file system but for /dev/shm and /etc/hosts.
_INIT = """\
hostname {name} && mount --bind {hosts} /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
{slurmd} -D -N {name} -f {conf} &
wait $!
"""


def node_command(name: str, layout: Layout) -> list[str]:
    """Start a node. Killing this process (`unshare`) kills all that runs in the node, like a power cut."""
    script = _INIT.format(
        name=shlex.quote(name),
        hosts=shlex.quote(str(layout.etc / "hosts")),
        slurmd=shlex.quote(find_program("slurmd")),
        conf=shlex.quote(str(layout.slurm_conf)),
    )
    namespaces = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc"]
    return unshare(*namespaces, "--", find_program("bash"), "-c", script)


def controller_command(layout: Layout) -> list[str]:
    """Start slurmctld with an empty state, under the host name that slurm.conf knows it by."""
    slurmctld = [find_program("slurmctld"), "-D", "-c", "-f", str(layout.slurm_conf)]
    return unshare(
        "--uts", "--", find_program("bash"), "-c", f"hostname localhost && exec {shlex.join(slurmctld)}"
    )


def check_namespaces(daemons: Daemons) -> None:
    """Try whether this machine lets us make namespaces at all.

    Raises:
        DaemonError: it does not; the message says what to change.
    """
    try:
        daemons.run(unshare("--mount", "--pid", "--fork", "--uts", "--", "true"))
    except DaemonError as error:
        raise DaemonError(
            f"{error}. The nodes are Linux namespaces, which need CAP_SYS_ADMIN (a container: --privileged), or for an"
            " ordinary user a kernel that allows user namespaces (user.max_user_namespaces > 0)."
        ) from None


def unshare(*arguments: str) -> list[str]:
    """unshare(1); an ordinary user gets the privilege for it from a user namespace."""
    privilege = [] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"]
    return [find_program("unshare"), *privilege, *arguments]
