"""The submitit executor on a real Slurm: any function, any layout, also as a plugin."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from hpc.executor import Job, SlurmlimeExecutor, check_script
from hpc.render import BatchScript
from hpc.sandbox import Sandbox
from hpc.slurm import SlurmError

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
    while not job.watcher.is_done(job.job_id, mode="force"):  # there is a result before the job has ended
        time.sleep(0.1)
    assert job.state == "COMPLETED"
    assert "hello from here" in (job.stdout() or "")


def test_error_and_cancel(cluster: Sandbox, tmp_path: Path) -> None:
    executor = SlurmlimeExecutor(tmp_path, BatchScript((SMALL, SMALL), command=""))
    with pytest.raises(submitit.core.utils.FailedJobError, match="invalid literal"):
        executor.submit(int, "no number").result()
    job = executor.submit(time.sleep, 600)
    job.cancel()
    job.cancel()  # once more is no error
    while not job.done(force_check=True):
        time.sleep(0.1)
    assert job.state == "CANCELLED"
    with pytest.raises(submitit.core.utils.UncompletedJobError):
        Job._results_timeout_s = 0
        job.result()


def test_refusal_is_shown_in_full(cluster: Sandbox, tmp_path: Path) -> None:
    executor = SlurmlimeExecutor(tmp_path, BatchScript(({**SMALL, "partition": "nowhere"},), command=""))
    with pytest.raises(SlurmError, match=r"refused the script .*\.sbatch:\n.*invalid partition") as error:
        executor.submit(make_task(), "never")
    path = Path(str(error.value).split("the script ")[1].split(":\n")[0])
    assert "--partition=nowhere" in path.read_text()
    with pytest.raises(SlurmError, match="would refuse"):
        check_script(path.read_text())


def test_plugin(cluster: Sandbox, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="slurmlime")
    executor.update_parameters(timeout_min=1, slurmlime_partition="gpu", nodes=2, name="by-plugin")
    jobs = executor.map_array(make_task(), ["a", "b"])
    assert [job.result()[0] for job in jobs] == ["a", "b"]
    assert all(type(job) is Job for job in jobs)
    assert "--nodes=2" in jobs[0].paths.submission_file.read_text()
