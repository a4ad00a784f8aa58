"""A submitit executor whose batch scripts are rendered from `slurm_templates/`, for every kind of Slurm job.

    executor = SlurmlimeExecutor("logs", BatchScript(components=({"nodes": "1"}, {"nodes": "2"}), …))
    job = executor.submit(function)           # runs as the batch process of the first component
    job.result(), job.state, job.cancel(), job.stdout()

submitit finds it as a plugin too: `submitit.AutoExecutor(folder, cluster="slurmlime")`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import submitit
from submitit.core import core, utils
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from hpc.render import BatchScript
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.environment import without_slurm
from hpc.slurm.states import JobState
from hpc.slurm_tables import Value

_RENAMED = {"stderr_to_stdout", "signal_delay_s", "setup", "additional_parameters", "array_parallelism"}


# States that a job may be about to leave: requeued after all, or not yet known. They last when seen so often.
_PASSING = (JobState.UNKNOWN, JobState.PREEMPTED, JobState.NODE_FAIL)
_PATIENCE = 3


class Watcher(SlurmInfoWatcher):
    """States of many jobs with one call: of sacct, and of squeue for those that it lacks.

    submitit's own knows neither the ids of heterogeneous jobs nor the end of a job where there is no sacct.
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
        """End the job with all its components; that it has ended already is no error."""
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
        job = self.job_class(folder=self.folder, job_id=sbatch(path), tasks=[0])
        job.paths.move_temporary_file(path, "submission_file")
        return job


def sbatch(path: Path, *options: str) -> str:
    """Submit a script as it stands, whatever the environment says; returns the job's id.

    Raises:
        SlurmError: sbatch's refusal in full, with the script's path.
    """
    try:
        said = SlurmClient().run("sbatch", "--parsable", *options, str(path))
    except SlurmUnavailableError:
        raise
    except SlurmError as error:
        raise SlurmError(f"sbatch refused the script {path}:\n{error}") from None
    match = re.fullmatch(r"(\d+)(;\S+)?", said.strip().splitlines()[-1] if said.strip() else "")
    if not match:
        raise SlurmError(f"sbatch took {path}, but its answer has no job id: {said!r}")
    return match[1]


def check_script(script: str) -> str:
    """What sbatch says to a script that it checks and does not submit.

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
