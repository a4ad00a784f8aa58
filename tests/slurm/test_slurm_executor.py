"""The submitit executor on a real Slurm: any function, any layout, also as a plugin."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit
from helpers.slurm_fixture import until, wait_for

from hpc.planning.script import BatchScript
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.states import JobState
from hpc.submitting import executor as executor_module
from hpc.submitting.executor import Job, SlurmlimeExecutor, check_script, end_lost_jobs

pytestmark = pytest.mark.slurm

SMALL = {"nodes": "1", "partition": "gpu", "time": "1"}


@pytest.fixture
def cluster(idle_cluster: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setenv("SLURM_CONF", idle_cluster.env["SLURM_CONF"])
    return idle_cluster


def make_task() -> Callable[[str], tuple[str, str, str]]:
    """A function that is pickled by value: the job can't import this module."""

    def task(word: str) -> tuple[str, str, str]:
        print("hello from", word)
        return word, os.uname().nodename, os.environ.get("SLURM_HET_SIZE", "0")

    return task


@pytest.mark.parametrize("components", [(SMALL,), (SMALL, {**SMALL, "nodes": "2"})])
def test_result_state_and_output(
    cluster: Sandbox, tmp_path: Path, components: tuple[dict[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    script = BatchScript(components, command="", env={"SECRETLESS": "a b"}, setup=("umask 077",))
    job = SlurmlimeExecutor(tmp_path / "with space", script).submit(make_task(), "here")
    word, node, het_size = job.result()
    assert (word, node.startswith("node"), het_size) == ("here", True, "2" if len(components) > 1 else "0")
    # There is a result before the job has ended.
    until(lambda: job.watcher.is_done(job.job_id, mode="force"), 240, "the job to end")
    assert job.state == "COMPLETED"
    assert "hello from here" in (job.stdout() or "")


def test_error_and_cancel(cluster: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = SlurmlimeExecutor(tmp_path, BatchScript((SMALL, SMALL), command=""))
    with pytest.raises(submitit.core.utils.FailedJobError, match="invalid literal"):
        executor.submit(int, "no number").result()
    job = executor.submit(time.sleep, 600)
    job.cancel()
    job.cancel()  # once more is no error
    until(lambda: job.done(force_check=True), 240, "the job to end")
    assert job.state == "CANCELLED"
    monkeypatch.setattr(Job, "_results_timeout_s", 0)
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        job.result()


def test_refusal_is_shown_in_full(cluster: Sandbox, tmp_path: Path) -> None:
    executor = SlurmlimeExecutor(tmp_path, BatchScript(({**SMALL, "partition": "nowhere"},), command=""))
    with pytest.raises(SlurmError, match=r"refused the script .*\.sbatch:\n.*invalid partition") as error:
        executor.submit(make_task(), "never")
    path = Path(str(error.value).split("the script ")[1].split(":\n")[0])
    assert "--partition=nowhere" in path.read_text()
    with pytest.raises(SlurmError, match="would refuse"):
        check_script(path.read_text())


@pytest.mark.parametrize(
    "after",
    ["echo Welcome to the cluster", "echo 'Socket timed out on send/recv operation' >&2; exit 1"],
)
def test_a_job_is_found_by_its_script_where_sbatch_does_not_say_its_id(
    cluster: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """A site's own words after the id, or a controller that took the job and answered too late."""
    quiet = ">/dev/null" if "exit" in after else ""
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" {quiet}\n{after}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    job = SlurmlimeExecutor(tmp_path / "x", BatchScript((SMALL, SMALL), command="")).submit(
        make_task(), "here"
    )
    assert job.result()[0] == "here"


def test_a_job_that_comes_up_after_its_submit_had_given_up_is_cancelled(
    cluster: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(SlurmClient, "job_of_script", lambda client, path: None)
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >/dev/null\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    with pytest.raises(SlurmError, match="If one appears later"):
        SlurmlimeExecutor(tmp_path, BatchScript(({**SMALL, "hold": True},), command="")).submit(
            make_task(), "x"
        )
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    [job] = end_lost_jobs(tmp_path)
    assert wait_for(cluster, job).state is JobState.CANCELLED and end_lost_jobs(tmp_path) == []


def test_plugin(cluster: Sandbox, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="slurmlime")
    executor.update_parameters(timeout_min=5, slurmlime_partition="gpu", nodes=2, name="by-plugin")
    jobs = executor.map_array(make_task(), ["a", "b"])
    assert [job.result()[0] for job in jobs] == ["a", "b"]
    assert all(type(job) is Job for job in jobs)
    assert "--nodes=2" in jobs[0].paths.submission_file.read_text()
