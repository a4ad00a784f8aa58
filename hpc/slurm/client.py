"""Run Slurm's commands. Thin: what they print is read by `parse.py` and `partitions.py`."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from hpc.slurm import parse
from hpc.slurm.partitions import Node, Partition, parse_config, parse_nodes, parse_partitions
from hpc.slurm.records import JobDetail, JobRecord, NodeState
from hpc.slurm.states import JobState, combined
from rltrain.run.errors import UserError

_DOES_NOT_ANSWER = (
    *("Unable to contact slurm", "Connection refused", "Socket timed out", "Zero Bytes were transmitted"),
    *("failed to open persistent connection", "Problem talking to the database", "Connection timed out"),
    *("Unable to connect to database", "Unexpected message received"),
    *("Connection reset by peer", "backup controller in standby mode"),  # one that ends, or has just begun
)
_NO_SUCH_JOB = "Invalid job id specified"
# Input options of sbatch, salloc, srun and sacct as variables; inside a job, also what that job is.
_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SACCT_", "SINFO_", "SQUEUE_", "SCANCEL_", "SPRIO_")
# Where the cluster is: kept.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")


class SlurmError(UserError):
    """A command of Slurm's refused or failed; the message has the command and all it said."""


class SlurmUnavailableError(SlurmError):
    """A daemon of Slurm's does not answer: the same call may work later."""


@dataclass(frozen=True)
class JobStatus:
    """The state of a job.

    Attributes:
        job: id of the job, of the leader if it is heterogeneous.
        state: of the job as a whole; UNKNOWN if Slurm has no record (any more, or not yet).
        components: one record a component, in order; one in all for a job that is not heterogeneous.
    """

    job: str
    state: JobState
    components: tuple[JobRecord, ...]

    @property
    def exit_code(self) -> int | None:
        """Exit code of the batch script, which runs in the first component."""
        return self.components[0].exit_code if self.components else None

    @property
    def reason(self) -> str | None:
        """Why it waits or ended so, as far as Slurm says."""
        return next((record.reason for record in self.components if record.reason), None)


class SlurmClient:
    """The cluster that `env` leads to.

    Args:
        env: environment of the commands, by default this process's without the variables that change what they do.
        timeout_s: of one command; sacct and squeue can be slow on a large cluster.
    """

    def __init__(self, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> None:
        # Times as seconds since 1970: without it they are local, and an hour a year is there twice.
        self._env = {**without_slurm(os.environ if env is None else env), "SLURM_TIME_FORMAT": "%s"}
        self._timeout_s = timeout_s

    def run(self, *command: str, stdin: str | None = None) -> str:
        """Standard output of one of Slurm's commands.

        Raises:
            SlurmUnavailableError: a daemon did not answer, or not in time.
            SlurmError: the command is missing, or it failed.
        """
        program = self._find(command[0])
        if program is None:
            raise SlurmError(
                f"{command[0]} is not on PATH: this machine is not a login node of a Slurm cluster, or its module"
                " is not loaded. (To try things out without a cluster: python -m hpc.sandbox up DIR)"
            )
        try:
            done = subprocess.run(
                [program, *command[1:]],
                env=self._env,
                input=stdin if stdin is not None else "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise SlurmUnavailableError(f"{command[0]} gave no answer in {self._timeout_s:.0f} s.") from None
        if done.returncode:
            raise _explain(command, done.stderr.strip() or done.stdout.strip(), done.returncode)
        return done.stdout

    def _find(self, program: str) -> str | None:
        return shutil.which(program, path=self._env.get("PATH"))

    @functools.cached_property
    def config(self) -> dict[str, str]:
        """The cluster's configuration (`scontrol show config`), by Slurm's names."""
        return parse_config(self.run("scontrol", "show", "config"))

    @property
    def has_accounting(self) -> bool:
        """Whether there is a sacct here that knows this cluster's jobs."""
        stored = self.config.get("AccountingStorageType", "").endswith("slurmdbd")
        return stored and self._find("sacct") is not None

    def sacct(
        self, jobs: Iterable[str], since: datetime | None = None, every_attempt: bool = False
    ) -> list[JobRecord]:
        """Records of these jobs in the accounting database, all in one call.

        Args:
            jobs: ids.
            since: leave out jobs that had ended by then. Ids are used again when they run out or it is rebuilt.
            every_attempt: also those before the last, if the job was requeued.
        """
        chosen = ",".join(jobs)
        if not chosen:
            return []
        options = [
            "-X",
            "-n",
            "-P",
            f"--delimiter={parse.DELIMITER}",
            f"--format={','.join(parse.SACCT_COLUMNS)}",
        ]
        options += ["-D"] if every_attempt else []
        options += ["-S", since.astimezone().strftime("%Y-%m-%dT%H:%M:%S")] if since else []
        return parse.parse_sacct(self.run("sacct", *options, "-j", chosen))

    def squeue(self, jobs: Iterable[str] | None = None, user: str | None = None) -> list[JobRecord]:
        """Records of jobs that the controller knows: those that wait or run, and those that ended minutes ago.

        All in one call; jobs that it does not know are left out.
        """
        options = [*parse.SQUEUE_OPTIONS]
        if jobs is not None:
            chosen = ",".join(jobs)
            if not chosen:
                return []
            options += ["-j", chosen]
        if user is not None:
            options += ["-u", user]
        try:
            return parse.parse_squeue(self.run("squeue", *options))
        except SlurmError as error:
            if _NO_SUCH_JOB in str(error):  # said if it knows none of them and was asked for one
                return []
            raise

    def poll(self, jobs: Iterable[str], since: datetime | None = None) -> dict[str, JobStatus]:
        """State of each of these jobs: one call of sacct; of squeue for those that it lacks or where there is none.

        Raises:
            SlurmUnavailableError: the controller does not answer.
        """
        wanted = list(dict.fromkeys(jobs))
        records: list[JobRecord] = []
        if self.has_accounting:
            try:
                records = self.sacct(wanted, since)
            except SlurmUnavailableError:  # the database has its own outages
                records = []
        known = {record.key.job for record in records}
        records += self.squeue(job for job in wanted if job not in known)
        return {job: status_of(job, records) for job in wanted}

    def job_of_script(self, path: str) -> str | None:
        """Id of this user's job with this batch script, of the leader if it is heterogeneous; None if there is none.

        Jobs that ended minutes ago are found, too.
        """
        for line in self.run("squeue", "--me", "-h", "-t", "all", "-o", "%i|%o").splitlines():
            job, _, command = line.strip().partition("|")
            if command == path:
                return job.partition("+")[0]
        return None

    def job_details(self, job: str) -> list[JobDetail]:
        """Details of a job from the controller, one a component; none if it has forgotten the job."""
        try:
            return parse.parse_job_details(self.run("scontrol", "show", "job", "-o", job))
        except SlurmError as error:
            if _NO_SUCH_JOB in str(error):
                return []
            raise

    def partitions(self) -> list[Partition]:
        """All partitions that this user may see."""
        return parse_partitions(self.run("scontrol", "show", "partition", "-o"))

    def nodes(self) -> list[Node]:
        """All nodes."""
        return parse_nodes(self.run("scontrol", "show", "node", "-o", "-d"))

    def node_states(self) -> list[NodeState]:
        """All nodes, with their states only."""
        return parse.parse_sinfo(self.run("sinfo", *parse.SINFO_OPTIONS))

    def accounts(self, user: str) -> list[str]:
        """Accounts that a user may charge; only with accounting."""
        table = self.run("sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account")
        return list(dict.fromkeys(table.split()))

    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs, with all components and steps. Those that have ended already do not count as errors."""
        if jobs:
            self.run("scancel", *jobs)

    def requeue(self, job: str) -> None:
        """Stop a job and put it back into the queue; of a heterogeneous job `job` is the leader's id."""
        self.run("scontrol", "requeue", job)


def status_of(job: str, records: Iterable[JobRecord]) -> JobStatus:
    """Status of one job from records of many."""
    own = sorted(
        (record for record in records if record.key.job == job), key=lambda record: record.key.component or 0
    )
    return JobStatus(job, combined(record.state for record in own), tuple(own))


def _explain(command: Sequence[str], said: str, code: int) -> SlurmError:
    if any(sign in said for sign in _DOES_NOT_ANSWER):
        return SlurmUnavailableError(
            f"Slurm does not answer {command[0]}: {said}. It may be restarting, or this machine can't reach it."
        )
    return SlurmError(f"{command[0]} failed (exit code {code}): {said or 'no message'}")


def without_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """`env` without the variables that change what Slurm's commands do or print.

    They would override what a batch script says (`SBATCH_PARTITION`), or carry the limits of the job that one is in
    over to the job that is submitted (`SLURM_CPU_BIND`, `SLURM_MEM_PER_CPU`).
    """
    return {key: value for key, value in env.items() if key in _KEPT or not key.startswith(_PREFIXES)}
