"""Runs on a sandbox's Slurm with small stand-ins for the roles (tests/fakes)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.local_job import wait_until
from helpers.run_files import events_of, lines_of
from helpers.slurm_fixture import ASK_PAUSE, until
from hpc.sandbox import Sandbox
from hpc.submitting.executor import Job
from rltrain.run.layout import RunLayout

FAKE_SUBMIT = Path(__file__).parents[1] / "fakes" / "submit.py"
SERVICES = {"router": ["serve"], "engine": ["serve"], "rollout": ["serve"], "trainer": ["train"]}
FLAGS = ["--name=job", "--global-batch-size=2", "--n-samples-per-prompt=2", "--num-gpus-per-node=1"]


class FakeRun:
    """A run with fake roles, submitted to a cluster."""

    def __init__(self, directory: Path, cluster: Sandbox) -> None:
        self.directory, self.cluster = directory, cluster
        self.layout = RunLayout(directory / "runs" / "job")

    def start(
        self, *flags: str, steps: int = 3, partition: str = "gpu", engines: int = 2, **roles: list[str]
    ) -> subprocess.Popen[str]:
        fake = {"FAKE_PLAN": json.dumps({**SERVICES, **roles}), "FAKE_ENGINES": str(engines)}
        hostile = {"SBATCH_PARTITION": "nowhere", "SLURM_NTASKS": "7", "SBATCH_EXPORT": "NONE"}
        return subprocess.Popen(
            [
                sys.executable,
                str(FAKE_SUBMIT),
                *FLAGS,
                f"--partition={partition}",
                f"--num-rollout={steps}",
                *flags,
            ],
            cwd=self.directory,
            env={**self.cluster.env, **fake, **hostile},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *flags: str, timeout: float = 300, **more: object) -> tuple[int, str, str]:
        process = self.start(*flags, **more)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def finish_after(
        self, condition: Callable[[], object], *flags: str, **more: object
    ) -> tuple[int, str, str]:
        """As `finish`; the trainer waits before its last steps until the condition holds."""
        process = self.start(*flags, steps=8, trainer=["pause"], **more)  # type: ignore[arg-type]
        until(
            lambda: bool(condition()) or process.poll() is not None,
            240,
            lambda: "what the trainer waits for:\n" + self.output(),
        )
        if process.poll() is None:
            self.go_on()
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def go_on(self) -> None:
        """For a trainer that pauses."""
        (self.layout.root / "go_on").touch()

    def detach(self, *flags: str, **more: object) -> Job:
        code, out, err = self.finish("--detach", *flags, **more)
        assert code == 0, err
        assert "submitted job as job" in out
        return self.job()

    def job(self) -> Job:
        os.environ["SLURM_CONF"] = self.cluster.env["SLURM_CONF"]  # submitit's Job knows no other way
        return Job(self.layout.submitit, self.entries()[-1]["job_id"])

    def entries(self) -> list[dict]:
        return json.loads(self.layout.job.read_text())

    def events(self, kind: str) -> list[dict]:
        return events_of(self.layout, kind)

    def steps(self) -> list[int]:
        return [row["step"] for row in lines_of(self.layout.metrics)]

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self.layout.submitit.glob("*log.*")))


@pytest.fixture
def run(idle_cluster: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRun]:
    monkeypatch.setenv("SLURM_CONF", idle_cluster.env["SLURM_CONF"])
    directory = Path(tempfile.mkdtemp(prefix="slurm-job-"))
    yield FakeRun(directory, idle_cluster)
    idle_cluster.run("scancel", "--full", "--signal=KILL", "--name=job")
    idle_cluster.run("scancel", "--name=job")
    wait_until(
        lambda: not idle_cluster.run("squeue", "-h", "--name=job"),
        120,
        "the job to let go of its directory",
        ASK_PAUSE,
    )
    shutil.rmtree(directory)
