"""The environment that Slurm's commands are run with."""

from __future__ import annotations

from collections.abc import Mapping

# Input options of sbatch, salloc, srun and sacct as variables; inside a job, also what that job is.
_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SACCT_", "SINFO_", "SQUEUE_", "SCANCEL_", "SPRIO_")
# Where the cluster is: kept.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


def without_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the variables that change what Slurm's commands do or print.

    They would override what a batch script says (`SBATCH_PARTITION`), or carry the limits of the job that one is in
    over to the job that is submitted (`SLURM_CPU_BIND`, `SLURM_MEM_PER_CPU`).
    """
    return {key: value for key, value in env.items() if key in _KEPT or not key.startswith(_PREFIXES)}
