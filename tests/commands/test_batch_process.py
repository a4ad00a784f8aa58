"""The batch process of a job: what it hands on, and what follows when its child, the supervisor, is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.run_files import lines_of

from hpc.batch import after_kill
from hpc.keeper import ChildEnd
from hpc.runs.find import read_run
from hpc.slurm.client import SlurmError, SlurmUnavailableError
from hpc.slurm.states import JobState
from hpc.supervisor import slurm_supervisor
from hpc.supervisor.restart import JobView
from hpc.supervisor.slurm_supervisor import CurrentJob, SlurmSupervisor
from rltrain.run.files import EventLog
from rltrain.run.finished import Finish, write_finish
from rltrain.run.layout import RunLayout
from rltrain.run.processes import wait_readable

NO_REQUEUE = JobView(JobState.RUNNING, restarts=0, may_requeue=False, is_preempted=False)


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLayout:
    """Of a run of three steps whose first attempt has begun, in a job of Slurm."""
    layout = RunLayout(tmp_path)
    layout.log_dir(1).mkdir(parents=True)
    EventLog(layout.events, 1).append("attempt_started", {})
    config = SimpleNamespace(rollout=SimpleNamespace(num_rollout=3))
    monkeypatch.setattr("rltrain.arguments.load", lambda directory: config)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm_supervisor, "_SETTLE_SECONDS", 0.0)
    return layout


def test_what_follows_when_the_supervisor_was_killed(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CurrentJob, "view", lambda job: NO_REQUEUE)
    supervisor = SlurmSupervisor(layout.root, cast(Any, None))
    assert supervisor.after_kill(signal.SIGKILL, for_memory=True, begun=0.0) is False
    # Its end is there already, and then that of the next.
    assert supervisor.after_kill(signal.SIGKILL, for_memory=None, begun=0.0) is False
    assert supervisor.after_kill(signal.SIGTERM, for_memory=None, begun=time.time()) is False
    ends = [(each["kind"], each["reason"]) for each in lines_of(layout.events)[1:]]
    assert [kind for kind, _ in ends] == [
        "attempt_finished", "not_requeued", "not_requeued", "never_begun", "not_requeued",
    ]  # fmt: skip
    assert "by SIGKILL: no memory left" in ends[0][1] and "resubmit it" in ends[1][1]
    assert ends[3][1] == "the supervisor was killed by SIGTERM"
    assert ends[4][1] == "stopped by a signal that was not Slurm's"
    assert json.loads(layout.status.read_text())["phase"] == "failed"
    record = read_run(layout)
    assert record.state == "failed" and "`mem` in [slurm.sbatch]" in (record.reason or "")
    write_finish(layout, Finish(steps=3, attempt=1))
    assert supervisor.after_kill(signal.SIGKILL, for_memory=False, begun=0.0) is True
    assert json.loads(layout.status.read_text())["phase"] == "finished"


def test_a_person_who_stops_a_job_before_or_after_its_attempt_stops_it(
    layout: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal meets a process that does not look for it, and ends by it."""
    may_requeue = replace(NO_REQUEUE, may_requeue=True)
    monkeypatch.setattr(CurrentJob, "view", lambda job: may_requeue)
    job = SimpleNamespace(function=SlurmSupervisor(layout.root, cast(Any, None)))
    monkeypatch.setattr("submitit.core.utils.DelayedSubmission.load", lambda path: job)
    (tmp_path / "job.pkl").write_bytes(b"")
    (tmp_path / "job.pkl").chmod(0o600)
    interrupted = ChildEnd(-signal.SIGINT, for_memory=None, begun=0.0, interrupted=True)
    assert after_kill(tmp_path / "job.pkl", interrupted) == 128 + signal.SIGINT
    ends = [each["reason"] for each in lines_of(layout.events)[1:]]
    assert ends[-1] == "stopped on request"
    assert json.loads(layout.status.read_text())["phase"] == "stopped"


KEPT = """
import signal, sys, time
from hpc.keeper import keep
ended = keep()
if ended is None:
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
    print(__import__("os").getpid(), flush=True)
    while True: signal.pause()
print(ended.code, ended.was_killed, ended.interrupted, flush=True)
"""


@pytest.mark.parametrize("whom", ["child", "parent"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGUSR2, "7 False False"), (signal.SIGKILL, "-9 True False"), (signal.SIGINT, "-2 True ")],
)
def test_a_batch_process_hands_signals_on_and_outlives_its_child(
    whom: str, number: signal.Signals, said: str
) -> None:
    with subprocess.Popen([sys.executable, "-c", KEPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with open_pid(child) as pidfd:
            os.kill(child if whom == "child" else process.pid, number)
            assert wait_readable([pidfd], 60), "the child is still there"
        is_lost = (whom, number) == ("parent", signal.SIGKILL)
        found = process.stdout.read().strip()
        assert found == ("" if is_lost else said + str(whom == "parent") * said.endswith(" "))


@contextmanager
def open_pid(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_requeue_is_asked_for_until_slurm_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that restarted in that moment cost the run its next attempt: the job had failed."""
    monkeypatch.setattr(slurm_supervisor, "_ASK_AGAIN_SECONDS", 0.0)
    silences = iter([SlurmUnavailableError("a"), SlurmUnavailableError("b"), None, SlurmError("refused")])

    def ask() -> None:
        if (said := next(silences)) is not None:
            raise said

    slurm_supervisor._ask_until_answered(ask)
    with pytest.raises(SlurmError, match="refused"):
        slurm_supervisor._ask_until_answered(ask)
    monkeypatch.setattr(slurm_supervisor, "_SILENCE_SECONDS", -1.0)
    with pytest.raises(SlurmUnavailableError):
        slurm_supervisor._ask_until_answered(lambda: (_ for _ in ()).throw(SlurmUnavailableError("for ever")))
