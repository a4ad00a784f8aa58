"""Write what a real Slurm prints beside this file, for `test_slurm_parse.py`. Takes two minutes.

python tests/slurm_outputs/capture.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from helpers.slurm_fixture import open_directory, submit, until, wait_for  # noqa: E402

from hpc.sandbox import ClusterSpec, Sandbox  # noqa: E402
from hpc.slurm import parse  # noqa: E402
from hpc.slurm.client import SlurmClient  # noqa: E402
from hpc.slurm.states import JobState  # noqa: E402

JOBS = "1,2,3,4,5,6,7,9,10,11,12,13,14,15,17,18,20,21,22,23"
HET = "#SBATCH -N1 -p low --gpus-per-node=h100:2\n#SBATCH hetjob\n#SBATCH -N2 -p low --gpus-per-node=a100:4\n"


class Recorder(SlurmClient):
    """Keeps what commands print."""

    def record(self, name: str, *command: str) -> None:
        """Write the output of a command to a file."""
        (HERE / f"{name}.txt").write_text(self.run(*command))


def main() -> None:
    """Make jobs end in every way that a sandbox can make them end."""
    spec = ClusterSpec(accounting=True)
    with open_directory() as path, Sandbox(path, spec, owner_pid=os.getpid()) as cluster:
        make_history(cluster)
        time.sleep(2)  # for slurmdbd to write the last record
        record(Recorder(cluster.env))


def make_history(cluster: Sandbox) -> None:
    """The comments are the ids of the jobs."""
    timeout = submit(cluster, "sleep 600", "--time=1", "-p", "cpu")  # 1
    wait_for(cluster, submit(cluster, "srun true", "-J", 'it\'s | 100% "odd" JobState=FAILED'))  # 2
    wait_for(cluster, submit(cluster, "exit 3", "-p", "gpu"))  # 3
    wait_for(cluster, submit(cluster, "kill -9 $$"))  # 4
    cancelled = submit(cluster, "sleep 600")  # 5
    held = submit(cluster, "sleep 600", "--hold")  # 6
    wait_for(cluster, cancelled, JobState.RUNNING)
    cluster.run("scancel", cancelled, held)
    # 7+0, 7+1: preempted, requeued, finished
    het = submit(cluster, HET + 'if [ "$SLURM_RESTART_COUNT" ]; then exit 0; fi; sleep 600', "-J", "het-demo")
    wait_for(cluster, het, JobState.RUNNING)
    rival = submit(cluster, "sleep 1", "-p", "high", "-N6", "--exclusive", "--begin=now+3")  # 9
    wait_for(cluster, rival)
    wait_for(cluster, het, JobState.COMPLETED)
    killed = submit(cluster, "sleep 600", "-p", "lowcancel", "-N1", "--gpus-per-node=4")  # 10
    wait_for(cluster, killed, JobState.RUNNING)
    wait_for(cluster, submit(cluster, "sleep 1", "-p", "high", "-N6", "--exclusive"))  # 11
    wait_for(cluster, killed)
    dead = submit(cluster, "sleep 600", "--no-requeue", "-w", "node6")  # 12
    again = submit(cluster, "sleep 600", "--requeue", "-w", "node6")  # 13: waits for the node at the end
    wait_for(cluster, dead, JobState.RUNNING)
    wait_for(cluster, again, JobState.RUNNING)
    cluster.power_off("node6")
    requeued = submit(cluster, 'if [ "$SLURM_RESTART_COUNT" ]; then exit 0; fi; sleep 600')  # 14
    wait_for(cluster, requeued, JobState.RUNNING)
    cluster.run("scontrol", "requeue", requeued)
    wait_for(cluster, requeued, JobState.COMPLETED)
    wait_for(cluster, submit(cluster, "true", "--array=1,3") + "_3")  # 15_1, 15_3
    wait_for(cluster, submit(cluster, "true", "--uid=games"))
    wait_for(cluster, timeout, timeout=120)
    running = submit(cluster, HET + "sleep 600", "-J", "het-demo")
    wait_for(cluster, running, JobState.RUNNING)
    submit(cluster, "sleep 600", "-N6", "--exclusive", "--comment", "waits for node6")
    submit(cluster, "sleep 600", "--array=1-2", "--begin=now+1hour")
    graced = submit(cluster, "trap '' TERM; sleep 600", "-p", "lowgrace", "-w", "node2", "--exclusive")
    wait_for(cluster, graced, JobState.RUNNING)
    submit(cluster, "sleep 600", "-p", "high", "-w", "node2", "--exclusive")
    cluster.run("scontrol", "update", "nodename=node3", "state=drain", "reason=disk is full")
    until(lambda: "PreemptTime=1" in show(cluster, graced), 10, "preemption")


def show(cluster: Sandbox, job: str) -> str:
    """What the controller knows of a job."""
    return SlurmClient(cluster.env).run("scontrol", "show", "job", "-o", job)


def record(slurm: Recorder) -> None:
    """Every command whose output we parse."""
    slurm.record("scontrol_show_job", "scontrol", "show", "job", "-o")
    slurm.record("squeue", "squeue", *parse.SQUEUE_OPTIONS)
    slurm.record(
        "sacct",
        "sacct",
        *parse.SACCT_OPTIONS,
        "-X",
        "-D",
        "-j",
        "1,2,3,4,5,6,7,9,10,11,12,13,14,15,17,18,20,21,22,23",
    )
    slurm.record("sacct_steps", "sacct", *parse.SACCT_OPTIONS, "-j", "2,7")
    slurm.record("sinfo", "sinfo", *parse.SINFO_OPTIONS)
    slurm.record("scontrol_show_partition", "scontrol", "show", "partition", "-o")
    slurm.record("scontrol_show_node", "scontrol", "show", "node", "-o", "-d")
    slurm.record("scontrol_show_config", "scontrol", "show", "config")


if __name__ == "__main__":
    main()
