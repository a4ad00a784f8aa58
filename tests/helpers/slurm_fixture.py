"""A real Slurm for tests marked `slurm`, and what such tests do with it.

Where Slurm is not installed they are skipped, with the command that installs it; in CI they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.local_job import wait_until
from hpc.sandbox import ClusterSpec, MissingPackagesError, Sandbox, require_packages
from hpc.slurm.client import JobStatus, SlurmClient, status_of
from hpc.slurm.states import JobState

ASK_PAUSE = 0.3  # between two questions to Slurm, each of which starts a program


def need_slurm() -> None:
    """Skip the test, or fail it in CI, unless all of Slurm is installed."""
    try:
        require_packages(accounting=True)
    except MissingPackagesError as error:
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"in CI the tests of Slurm must run: {error}", pytrace=False)
        pytest.skip(str(error))


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that every user of the machine can read, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="slurm-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Sandbox]:
    """One cluster for all tests: six nodes of four GPUs, one without, and accounting."""
    need_slurm()
    with (
        open_directory() as path,
        Sandbox(path, ClusterSpec(accounting=True), owner_pid=os.getpid()) as cluster,
    ):
        yield cluster


@pytest.fixture
def idle_cluster(slurm_cluster: Sandbox) -> Iterator[Sandbox]:
    """`slurm_cluster` with no jobs, every node on; afterwards too."""
    yield slurm_cluster
    slurm_cluster.run("scancel", "--signal=KILL", "--full", "--state=RUNNING")
    # On a busy machine a node may miss the word to end a job; it is repeated.
    wait_until(
        lambda: _make_quiet(slurm_cluster), 120, lambda: "no jobs:\n" + _who_is_busy(slurm_cluster), ASK_PAUSE
    )


def submit(cluster: Sandbox, script: str, *options: str, user: str | None = None) -> str:
    """Submit the lines of a batch script as a job; returns its id."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write("#!/bin/bash\n" + script)
        file.flush()
        Path(file.name).chmod(0o644)
        defaults = ("--parsable", "--output=/dev/null", "--chdir=/tmp")
        return cluster.run("sbatch", *defaults, *options, file.name, user=user).strip()


def wait_for(cluster: Sandbox, job: str, *states: JobState, timeout: float = 120.0) -> JobStatus:
    """Poll until a job is in one of these states (by default, in any final one); how it was then."""
    client, seen = SlurmClient(cluster.env), list[JobStatus]()

    def reached() -> bool:
        seen.append(status_of(job, client.squeue([job])))  # the controller itself: sacct lags by a second
        state = seen[-1].state
        return state in states if states else state.is_final

    what = f"job {job} to be {' or '.join(states) or 'over'}"
    wait_until(reached, timeout, what, ASK_PAUSE)
    return seen[-1]


def until(condition: Callable[[], object], timeout: float, what: str | Callable[[], str]) -> None:
    """`wait_until`, for conditions that read files while a job computes."""
    wait_until(condition, timeout, what, pause=0.1)


def _make_quiet(cluster: Sandbox) -> bool:
    """Cancel what runs, switch on what is off; whether every node is idle already."""
    nodes = SlurmClient(cluster.env).node_states()
    if all(node.state == "idle" for node in nodes):
        return True
    cluster.run("scancel", *(f"--state={state}" for state in ("PENDING", "RUNNING", "SUSPENDED")))
    for node in nodes:
        if node.state.startswith(("down", "drain")):
            cluster.power_on(node.name)
    return False


def _who_is_busy(cluster: Sandbox) -> str:
    """The jobs, and the nodes with their states and the reasons for those."""
    return cluster.run("squeue") + cluster.run("sinfo", "-N", "-o", "%N %T %E")
