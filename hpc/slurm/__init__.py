"""Read what Slurm's commands print, and run them.

Pure: `states` (what a state word means), `nodelist`, `values`, `parse` (jobs), `partitions` (partitions, nodes).
Thin: `client` runs the commands, `cluster` asks for everything that a plan needs.
"""

from hpc.slurm.client import JobStatus, SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.cluster import ClusterFacts, read_facts
from hpc.slurm.states import JobState

__all__ = [
    "ClusterFacts",
    "JobState",
    "JobStatus",
    "SlurmClient",
    "SlurmError",
    "SlurmUnavailableError",
    "read_facts",
]
