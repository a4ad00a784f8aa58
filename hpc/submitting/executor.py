"""A submitit executor whose batch scripts are rendered from `slurm_templates/`, for every kind of Slurm job.

    executor = SlurmlimeExecutor("logs", BatchScript(components=({"nodes": "1"}, {"nodes": "2"}), …))
    job = executor.submit(function)           # runs as the batch process of the first component
    job.result(), job.state, job.cancel(), job.stdout()

submitit finds it as a plugin too: `submitit.AutoExecutor(folder, cluster="slurmlime")`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import submitit
from submitit.core import core, utils
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from hpc.planning.script import BatchScript
from hpc.planning.slurm_tables import Value
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError, without_slurm
from hpc.slurm.states import JobState

_RENAMED = {"stderr_to_stdout", "signal_delay_s", "setup", "additional_parameters", "array_parallelism"}


# A job may be about to leave these states: requeued after all, or not yet known. They count when seen so often.
_PASSING = (JobState.UNKNOWN, JobState.PREEMPTED, JobState.NODE_FAIL)
_PATIENCE = 3

_SBATCH_SECONDS = 300.0  # for an answer of sbatch
_LOOK_SECONDS = 60.0  # for a job whose sbatch gave no id
_LOOK_AGAIN_SECONDS = 2.0
_JOB_ID = re.compile(r"(\d+)(;\S+)?")
LOST = ".lost"  # ending of a script that may have become a job whose id is unknown


class SlurmRefusalError(SlurmError):
    """sbatch did not take the script."""


class Watcher(SlurmInfoWatcher):
    """States of many jobs with one call: of sacct, and of squeue for those that it lacks.

    submitit's own watcher does not know the ids of heterogeneous jobs, nor the end of a job without sacct.
    """

    def __init__(self, delay_s: int = 60) -> None:
        super().__init__(delay_s)
        self._passing: Counter[str] = Counter()

    def update(self) -> None:
        """See `SlurmInfoWatcher`."""
        self._num_calls += 1
        waiting = sorted(self._registered - self._finished)
        try:
            found = SlurmClient().poll(waiting)
        except SlurmUnavailableError:
            found = {}
        for job, status in found.items():
            nodes = ",".join(node for record in status.components for node in record.nodes)
            self._info_dict[job] = {"JobID": job, "State": status.state.value, "NodeList": nodes}
            self._passing[job] += status.state in _PASSING
            if self._passing[job] > _PATIENCE or (status.state.is_final and status.state not in _PASSING):
                self._finished.add(job)
        self._last_status_check = core._time.time()

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """See `SlurmInfoWatcher`."""
        self.get_info(job_id, mode=mode)
        return job_id in self._finished


class Job(SlurmJob[Any]):
    """A job of any layout. Its task is the batch process."""

    watcher = Watcher(delay_s=60)

    def cancel(self, check: bool = True) -> None:
        """End the job with all its components. A job that has already ended is not an error."""
        try:
            SlurmClient().cancel([self.job_id])
        except SlurmError:
            if check:
                raise


class SlurmlimeExecutor(submitit.SlurmExecutor):
    """See the module's description.

    Args:
        folder: for submitit's files; every node must see it.
        script: flags of sbatch, environment and setup lines; its command is ours. Without it, the script follows from
            `update_parameters`.
        template: of the script, instead of the built-in one.
    """

    job_class = Job

    def __init__(
        self,
        folder: str | Path,
        script: BatchScript | None = None,
        template: Path | None = None,
        max_num_timeout: int = 3,
        max_pickle_size_gb: float = 1.0,
        python: str | None = None,
    ) -> None:
        # Past SlurmExecutor, which needs srun where a script is only looked at.
        core.PicklingExecutor.__init__(self, folder, max_num_timeout, max_pickle_size_gb)
        self.python = python or shlex.quote(sys.executable)
        self._script, self._template = script, template

    @classmethod
    def affinity(cls) -> int:
        """0: AutoExecutor takes it only if asked for by name."""
        return 0

    def script(self) -> str:
        """The batch script, exactly as it would be submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        script = self._script or _script_of(self.parameters)
        paths = utils.JobPaths(self.folder)
        own: dict[str, Value] = {
            "output": str(paths.stdout).replace("%t", "0"),
            "error": str(paths.stderr).replace("%t", "0"),
            "open-mode": "append",
        }
        first, *others = script.components
        return dataclasses.replace(
            script,
            components=({**own, **first}, *others),
            env={"SUBMITIT_EXECUTOR": "slurm", **script.env},
            command=command,
        ).text(self._template)

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -u -m hpc.batch {shlex.quote(str(self.folder))}"

    def _num_tasks(self) -> int:
        return 1  # whatever else runs is started by it

    def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
        # Not as an array: heterogeneous jobs have none, and submitit's arrays forget the executor's class.
        return core.PicklingExecutor._internal_process_submissions(self, delayed_submissions)

    def _submit_command(self, command: str) -> Job:
        Path(self.folder).mkdir(
            parents=True, exist_ok=True
        )  # a job without its output's directory fails mutely
        path = Path(self.folder) / f"{os.urandom(8).hex()}.sbatch"
        path.write_text(self._make_submission_file_text(command, ""))
        try:
            job = self.job_class(folder=self.folder, job_id=sbatch(path), tasks=[0])
        except SlurmRefusalError:
            raise
        except BaseException:  # Ctrl-C, too
            path.rename(f"{path}{LOST}")
            raise
        job.paths.move_temporary_file(path, "submission_file")
        return job


def sbatch(path: Path, *options: str) -> str:
    """Submit a script as it stands, whatever the environment says; returns the job's id.

    A busy controller may take the job and answer too late, and a site may print more than the id. Then the job is
    looked for by its script.

    Raises:
        SlurmError: sbatch's refusal in full, with the script's path; or there is no trace of the job.
    """
    try:
        said = SlurmClient(timeout_s=_SBATCH_SECONDS).run("sbatch", "--parsable", *options, str(path))
    except SlurmUnavailableError as error:
        return _find_job(path, str(error))
    except SlurmError as error:
        raise SlurmRefusalError(f"sbatch refused the script {path}:\n{error}") from None
    ids = [match[1] for line in said.splitlines() if (match := _JOB_ID.fullmatch(line.strip()))]
    return ids[0] if len(ids) == 1 else _find_job(path, f"sbatch accepted {path} and answered {said!r}.")


def _find_job(path: Path, problem: str) -> str:
    """The id of the job that has this script, as soon as the controller knows it."""
    client, deadline = SlurmClient(), time.monotonic() + _LOOK_SECONDS
    while True:
        with contextlib.suppress(SlurmUnavailableError):
            if job := client.job_of_script(str(path)):
                return job
        if time.monotonic() > deadline:
            raise SlurmError(
                f"{problem} Slurm has no job with the script {path} after {_LOOK_SECONDS:.0f} s. If one appears later"
                " (squeue --me), the next submit or cancel of this run ends it."
            )
        time.sleep(_LOOK_AGAIN_SECONDS)


def end_lost_jobs(folder: Path) -> list[str]:
    """Cancel jobs that came into the queue after their `submit` had given up; returns their ids.

    They could do nothing: what they were to run was never given their id.
    """
    client, ended = SlurmClient(), []
    for path in folder.glob(f"*{LOST}"):
        if job := client.job_of_script(str(path.with_suffix(""))):
            client.cancel([job])
            path.unlink(missing_ok=True)
            ended.append(job)
    return ended


def check_script(script: str) -> str:
    """Let sbatch check a script without submitting it; returns its words.

    Raises:
        SlurmError: it would refuse the script.
    """
    command = ["sbatch", "--test-only"]
    done = subprocess.run(
        command, input=script, env=without_slurm(os.environ), capture_output=True, text=True
    )
    if done.returncode:
        raise SlurmError(f"sbatch would refuse the script (--dry-run shows it):\n{done.stderr.strip()}")
    return (done.stdout + done.stderr).strip()


def _script_of(parameters: dict[str, Any]) -> BatchScript:
    """A job of one component from submitit's parameters."""
    own: dict[str, Value] = {
        name.replace("_", "-"): value if value is True else str(value)
        for name, value in parameters.items()
        if name not in _RENAMED and value not in (None, False)
    }
    own.setdefault("job-name", "submitit")
    own["signal"] = f"B:USR2@{parameters.get('signal_delay_s', 90)}"
    for name, value in (parameters.get("additional_parameters") or {}).items():
        own[name.replace("_", "-")] = value if value is True else str(value)
    return BatchScript((own,), command="", setup=tuple(parameters.get("setup") or ()))
