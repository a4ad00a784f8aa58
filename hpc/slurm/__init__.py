"""Read what Slurm's commands print, and run them.

Pure: `states` (what a state word means), `nodelist`, `values`, `parse` (jobs), `partitions` (partitions, nodes),
`cluster` (everything that a plan needs). Thin: `client` runs the commands, `facts` asks for what is in `cluster`.
"""

from hpc.slurm.client import JobStatus, SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.facts import read_facts
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
