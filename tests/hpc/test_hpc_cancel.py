"""Cancel a run: on this machine with the real supervisor and fake roles; what Slurm is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.local_job import PATIENCE, Job, wait_until
from helpers.run_files import Slurm, make_run, sacct_row, squeue_row, submitted_to_slurm

from hpc.cancel import cancel, main
from hpc.runs.lock import hold_lock
from hpc.slurm.client import SlurmUnavailableError
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

pytestmark = pytest.mark.slow


def test_orderly_stop_saves_and_can_be_resumed(job: Job) -> None:
    process = job.start(steps=1000)
    wait_until(lambda: len(job.steps()) > 1)
    command = [sys.executable, "-m", "hpc.cancel", "job"]
    done = subprocess.run(command, cwd=job.directory, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "asked to stop" in done.stdout and "-m hpc.resubmit job" in done.stdout
    process.communicate(timeout=PATIENCE)
    assert job.phase() == "stopped" and job.living() == []
    saved = int((job.layout.checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert saved == len(job.steps())

    again = subprocess.run(command, cwd=job.directory, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr == "error: job is not running: it is stopped.\n"


@pytest.mark.parametrize("behaviour", ["train", "hang"])
def test_now_does_not_wait(job: Job, behaviour: str) -> None:
    """Else it would for the time that saving may take."""
    process = job.start(trainer=[behaviour], steps=1000)
    wait_until(lambda: job.phase() == "training")
    assert "stopped without saving" in cancel(job.layout.root, now=True)
    process.communicate(timeout=PATIENCE)
    wait_until(lambda: not job.living())


def test_now_kills_a_supervisor_that_does_not_listen(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc.cancel._NOW_SECONDS", 0.5)
    process = job.start(steps=1000, engine=["serve"])
    wait_until(lambda: job.steps())
    os.kill(job.supervisor_pid(), signal.SIGSTOP)
    cancel(job.layout.root, now=True)
    process.communicate(timeout=PATIENCE)
    assert job.living() == []


def test_a_run_on_another_machine_is_not_signalled(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="training", attempts=1)
    with hold_lock(layout):
        layout.lock.write_text(f'{{"pid": {os.getpid()}, "host": "elsewhere", "since": 0}}')
        with pytest.raises(UserError, match="on elsewhere"):
            cancel(layout.root)


def on_slurm(tmp_path: Path, *jobs: str) -> RunLayout:
    return submitted_to_slurm(make_run(tmp_path, "x", phase="training", attempts=1), *jobs)


def test_every_job_that_is_alive_is_cancelled_the_spare_first(tmp_path: Path) -> None:
    layout = on_slurm(tmp_path, "20", "28", "31")
    client = Slurm(
        sacct=[sacct_row("20", "TIMEOUT")],
        squeue=[squeue_row("28+0", "RUNNING"), squeue_row("28+1", "RUNNING"), squeue_row("31", "PENDING")],
    )
    message = cancel(layout.root, client=client)
    # the spare one goes before the running one ends, which is asked and not killed
    assert client.calls[-2:] == [("scancel", "31"), ("scancel", "--batch", "--signal=INT", "28")]
    assert "jobs 31, 28" in message and "saves" in message and "hpc.resubmit x" in message

    assert "without saving" in cancel(layout.root, now=True, client=client)
    assert client.calls[-2:] == [("scancel", "31", "28"), ("scancel", "--signal=KILL", "--full", "31", "28")]


def test_a_job_that_waits(tmp_path: Path) -> None:
    layout = submitted_to_slurm(make_run(tmp_path, "x"), "28")
    client = Slurm(squeue=[squeue_row("28", "PENDING")])
    message = cancel(layout.root, client=client)
    assert "before it began" in message and "from the beginning: it has no checkpoint yet" in message
    assert [call for call in client.calls if call[0] == "scancel"] == [("scancel", "28")]


def test_nothing_to_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = on_slurm(tmp_path, "28")
    client = Slurm(sacct=[sacct_row("28", "TIMEOUT")])
    with pytest.raises(UserError, match="is not running"):
        cancel(layout.root, client=client)
    assert not any(call[0] == "scancel" for call in client.calls)

    def run(*command: str, stdin: str | None = None) -> str:
        raise SlurmUnavailableError("squeue gave no answer")

    monkeypatch.setattr(client, "run", run)
    with pytest.raises(UserError, match="squeue gave no answer"):
        cancel(layout.root, client=client)
    with pytest.raises(UserError, match="no run 'y'"):
        cancel("y", runs_dir=tmp_path)


def test_runs_by_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every one is tried; that some have ended already is no failure."""
    for name, phase in [("s.a", "finished"), ("s.b", "stopped"), ("s.c", "training"), ("other", "training")]:
        make_run(tmp_path, name, phase=phase, attempts=1)
    assert main(["s.a", "s.b", "--runs-dir", str(tmp_path)]) == 0
    assert main(["s.*", "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("is not running") == 5 and "s.c is not running: it is lost" in said and "other" not in said
    )
