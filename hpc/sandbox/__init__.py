"""A real Slurm of several nodes on one machine, for trying things out and for tests.

    python -m hpc.sandbox up DIR          starts it; everything it writes is below DIR
    eval "$(python -m hpc.sandbox env DIR)"
    sinfo; sbatch …; python -m hpc.submit …
    python -m hpc.sandbox down DIR

or in Python, where it ends with its owner even if that is killed:

    with Sandbox(directory, owner_pid=os.getpid()) as cluster:
        cluster.run("sinfo")
        cluster.power_off("node2")

The daemons are Slurm's own (munged, slurmctld, slurmd, and with accounting slurmdbd and MariaDB), run as ordinary
processes by root or by an ordinary user. A node is a set of Linux namespaces: its own host name, process ids, IPC,
/dev/shm and a 127.x.y.z address of its own; file system and network are shared. Its GPUs are names without
devices behind them.
"""

from hpc.sandbox.packages import MissingPackagesError, require_packages
from hpc.sandbox.sandbox import Sandbox
from hpc.sandbox.spec import ClusterSpec

__all__ = ["ClusterSpec", "MissingPackagesError", "Sandbox", "require_packages"]
