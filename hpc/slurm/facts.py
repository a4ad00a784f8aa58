"""Ask a cluster for everything that a plan needs."""

from __future__ import annotations

import getpass

from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.cluster import ClusterFacts


def read_facts(client: SlurmClient) -> ClusterFacts:
    """Ask the cluster.

    Raises:
        SlurmError: a command is missing, failed, or got no answer.
    """
    config = client.config
    enforces = "associations" in config.get("AccountingStorageEnforce", "")
    return ClusterFacts(
        name=config.get("ClusterName", ""),
        version=config.get("SLURM_VERSION", ""),
        partitions=tuple(client.partitions()),
        nodes=tuple(client.nodes()),
        preempt_type=config.get("PreemptType", "preempt/none"),
        job_requeue=config.get("JobRequeue") == "1",
        kill_wait_s=float(config.get("KillWait", "30 sec").split()[0]),
        has_accounting=client.has_accounting,
        accounts=_accounts(client) if enforces else None,
    )


def _accounts(client: SlurmClient) -> tuple[str, ...] | None:
    try:
        return tuple(client.accounts(getpass.getuser()))
    except SlurmError:  # sacctmgr may be closed to users: let sbatch decide
        return None
