"""When a job runs again, and what its supervisor reads from Slurm and from the run's events."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.planning.processes import RoleProcess
from hpc.slurm.states import JobState
from hpc.supervisor import watch
from hpc.supervisor.causes import Cause, TaskExit, end_of_process, end_of_step, parse_exits
from hpc.supervisor.restart import (
    Action,
    Ending,
    JobView,
    Limits,
    bad_nodes,
    can_be_spared,
    decide,
    idle_attempts,
    idle_failures,
    save_lead,
    step_seconds,
    why_not_begin,
)
from hpc.supervisor.roles import RunningRole, describe_exit, failure
from hpc.supervisor.said import Said, allow_many_files
from hpc.supervisor.slurm_supervisor import SlurmSupervisor
from hpc.supervisor.srun import _StepHandle, failed_nodes
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.finished import Finish, write_finish
from rltrain.run.layout import RunLayout

RUNNING = JobView(JobState.RUNNING, restarts=2, may_requeue=True, is_preempted=False)
IN_GRACE = JobView(JobState.RUNNING, restarts=2, may_requeue=True, is_preempted=True)
RESTARTED = JobView(JobState.COMPLETING, restarts=3, may_requeue=True, is_preempted=False)
CANCELLED = JobView(JobState.COMPLETING, restarts=2, may_requeue=True, is_preempted=False)
OUT_OF_TIME = JobView(
    JobState.COMPLETING, restarts=2, may_requeue=True, is_preempted=False, is_out_of_time=True
)
NO_REQUEUE = JobView(JobState.RUNNING, restarts=2, may_requeue=False, is_preempted=True)
LIMITS = Limits(max_restarts=10, max_failures=2)


@pytest.mark.parametrize(
    ("ending", "job", "action", "reason"),
    [
        (Ending("finished"), RUNNING, Action.END, "finished"),
        (Ending("finished", "SIGTERM"), IN_GRACE, Action.END, "finished"),
        (Ending("stopped", "SIGTERM"), RESTARTED, Action.WAIT, "Slurm requeues"),
        (Ending("failed", idle_failures=1), RESTARTED, Action.WAIT, "Slurm requeues"),
        (Ending("stopped", "SIGTERM"), CANCELLED, Action.END, "cancelled"),
        (Ending("failed", idle_failures=1), CANCELLED, Action.END, "cancelled"),
        (Ending("stopped", "SIGTERM"), OUT_OF_TIME, Action.REQUEUE, "out of time"),
        (Ending("stopped", "SIGTERM"), IN_GRACE, Action.REQUEUE, "preempted"),
        (Ending("stopped", "SIGUSR2"), IN_GRACE, Action.REQUEUE, "preempted"),
        (Ending("stopped", "SIGUSR2"), RUNNING, Action.REQUEUE, "time limit"),
        (Ending("stopped", "SIGTERM"), RUNNING, Action.END, "not Slurm's"),
        (Ending("stopped", "SIGINT"), RUNNING, Action.END, "on request"),
        (Ending("stopped"), RUNNING, Action.REQUEUE, "asked to be run again"),
        (Ending("stopped", "SIGTERM"), NO_REQUEUE, Action.END, "resubmit"),
        (Ending("stopped", "SIGTERM"), None, Action.REQUEUE, "preempted"),
        (Ending("failed", never_restart=True), RUNNING, Action.END, "same way"),
        (Ending("failed", idle_failures=1), RUNNING, Action.REQUEUE, "failed"),
        (Ending("failed", idle_failures=2), RUNNING, Action.END, "2 attempts in a row"),
        (Ending("failed", idle_failures=9, node_failed=True), RUNNING, Action.REQUEUE, "node"),
        (Ending("failed", cause=Cause.CLUSTER, idle_failures=9), RUNNING, Action.REQUEUE, "cluster"),
        (Ending("failed", cause=Cause.UNKNOWN, idle_failures=9), RUNNING, Action.REQUEUE, "unknown"),
        (Ending("failed", cause=Cause.UNKNOWN, idle_attempts=5), RUNNING, Action.END, "5 attempts in a row"),
        (Ending("stopped", "SIGUSR2", idle_attempts=5), RUNNING, Action.END, "5 attempts in a row"),
        (Ending("stopped", "SIGTERM", idle_attempts=5), IN_GRACE, Action.END, "5 attempts in a row"),
    ],
)
def test_decisions(ending: Ending, job: JobView | None, action: Action, reason: str) -> None:
    decision = decide(ending, job, 2, LIMITS)
    assert decision.action is action and reason in decision.reason


def test_requeues_are_bounded() -> None:
    again = Ending("stopped", "SIGUSR2")
    assert decide(again, RUNNING, 9, LIMITS).action is Action.REQUEUE
    job = JobView(JobState.RUNNING, restarts=10, may_requeue=True, is_preempted=False)
    assert decide(again, job, 10, LIMITS).action is Action.END


def failed(attempt: int) -> dict:
    return {"kind": "attempt_finished", "state": "failed", "attempt": attempt}


def test_failures_in_a_row() -> None:
    saved = {"kind": "checkpoint_saved", "attempt": 1}
    stopped = {"kind": "attempt_finished", "state": "stopped", "attempt": 1}
    lost = {"kind": "node_failed", "node": "n1", "attempt": 1, "time": 0.0}
    assert idle_failures([]) == 0
    assert idle_failures([failed(0), failed(1)]) == 2
    assert idle_failures([failed(0), saved, failed(1)]) == 0  # it made progress
    assert idle_failures([failed(0), saved, failed(1), failed(2)]) == 1
    assert idle_failures([failed(0), stopped, failed(2)]) == 2
    assert idle_failures([failed(0), failed(1), lost]) == 1
    assert idle_failures([failed(0), {"kind": "run_submitted"}, failed(1)]) == 1  # a person has looked at it
    assert (
        idle_failures([failed(0), {**failed(1), "cause": "cluster"}, {**failed(2), "cause": "unknown"}]) == 1
    )


def test_attempts_in_a_row_without_a_checkpoint() -> None:
    begun, saved = {"kind": "attempt_started"}, {"kind": "checkpoint_saved"}
    assert idle_attempts([begun, begun]) == 2
    assert idle_attempts([begun, saved, begun, begun]) == 2
    assert idle_attempts([begun, begun, {"kind": "run_submitted"}, begun]) == 1
    five = [{"kind": "run_submitted"}, *[begun] * 5]
    assert "5 attempts" in (why_not_begin(five, LIMITS, was_requeued=True) or "")
    assert why_not_begin(five[:-1], LIMITS, was_requeued=True) is None
    assert idle_attempts([begun, {"kind": "never_begun"}, {"kind": "never_begun"}]) == 3
    assert (
        why_not_begin([failed(0), failed(1)], LIMITS, was_requeued=True) is None
    )  # decided before the requeue


def test_spare_jobs_that_have_no_use() -> None:
    submitted = {"kind": "run_submitted"}
    hopeless = {**failed(0), "never_restart": True}
    assert why_not_begin([], LIMITS) is None
    assert why_not_begin([submitted, failed(0)], LIMITS) is None
    assert "same way" in (why_not_begin([submitted, hopeless], LIMITS) or "")
    assert "2 attempts in a row" in (why_not_begin([submitted, failed(0), failed(1)], LIMITS) or "")
    assert why_not_begin([submitted, hopeless, failed(1), submitted], LIMITS) is None  # resubmitted since
    stopped = {"kind": "attempt_finished", "state": "stopped", "attempt": 1}
    assert why_not_begin([submitted, failed(0), stopped], LIMITS) is None


def test_nodes_that_failed_twice_within_a_day() -> None:
    def lost(node: str, time: float) -> dict:
        return {"kind": "node_failed", "node": node, "time": time}

    day = 24 * 3600.0
    events = [lost("a", 0.0), lost("b", 0.0), lost("a", day), lost("c", day), lost("c", day + 1)]
    assert bad_nodes(events, day - 1) == ["a", "c"]
    assert bad_nodes(events, day + 10) == ["c"]
    assert bad_nodes(events, 9 * day) == []
    assert bad_nodes([*events, lost("c", day + 2)], day + 2) == ["c"]
    assert bad_nodes([*events, lost("c", day + 2), lost("a", day + 2)], day + 3) == [
        "c",
        "a",
    ]  # the worst first


def test_a_job_excludes_no_more_nodes_than_its_partition_can_spare() -> None:
    nodes = {"a", "b", "c", "d"}
    assert can_be_spared(["c", "a", "elsewhere"], nodes, needed=2) == ["c", "a"]
    assert can_be_spared(["c", "a"], nodes, needed=3) == ["c"]
    assert can_be_spared(["c", "a"], nodes, needed=4) == []


def test_lead_follows_the_slowest_step() -> None:
    assert save_lead([]) == 120
    assert save_lead([{"perf/step_s": 400.0}, {"perf/step_s": 10.0}, {"eval/x": 1}]) == 630
    assert save_lead([{"perf/step_s": 1e6}]) == 3600


def test_start_and_step_are_measured() -> None:
    def event(kind: str, attempt: int, time: float) -> dict:
        return {"kind": kind, "attempt": attempt, "time": time}

    events = [event("attempt_started", 0, 0.0), event("weights_updated", 0, 90.0), event("weights_updated", 0, 200.0),
              event("attempt_started", 1, 500.0), event("weights_updated", 1, 530.0)]  # fmt: skip
    assert step_seconds(events, [{"perf/step_s": 40.0}, {"perf/step_s": 4.0}]) == 130.0
    assert step_seconds([], []) == 0.0
    # An hour that the clock has jumped ahead in a start is no part of it: no time limit would be long enough.
    ahead = [event("attempt_started", 2, 900.0), {**event("weights_updated", 2, 4600.0), "elapsed_s": 100.0}]
    assert step_seconds([*events, *ahead], [{"perf/step_s": 40.0}]) == 140.0


SRUN_SAYS = """\
srun: error: node4: task 3: Exited with exit code 3
slurmstepd-node3: error: *** STEP 2.1 ON node3 CANCELLED AT 2026-11-22T14:45:45 ***
srun: error: node3: tasks 0-1: Killed
srun: error: node2: task 7: Segmentation fault (core dumped)
srun: error: Node failure on node5
"""


def test_what_srun_says(tmp_path: Path) -> None:
    assert parse_exits(SRUN_SAYS) == [
        TaskExit("node4", 3, 3),
        TaskExit("node3", 0, -9),
        TaskExit("node2", 7, -11),
    ]
    (tmp_path / "srun-engine-0.log").write_text(SRUN_SAYS)
    assert failed_nodes(tmp_path) == ["node5"]


SAID = "srun: error: "


@pytest.mark.parametrize(
    ("said", "code", "cause", "reason"),
    [
        (SAID + "node1: task 0: Exited with exit code 3", 3, Cause.CODE, ""),
        (SAID + "node1: task 0: Segmentation fault (core dumped)", -11, Cause.CODE, ""),
        (SAID + "node1: task 0: Killed", -9, Cause.UNKNOWN, ""),
        (SAID + "node1: task 0: Out Of Memory", -9, Cause.CODE, "out of memory"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.2.\n" + SAID + "node1: task 0: Killed", -9,
         Cause.CODE, "out of memory"),
        (SAID + "Node failure on node5\n" + SAID + "node5: task 0: Killed", -9, Cause.CLUSTER, "node node5 failed"),
        (SAID + "Unable to create step for job 7: Invalid generic resource (gres) specification", 1, Cause.CLUSTER,
         "Slurm did not start it"),
        (SAID + "Unable to confirm allocation for job 7: Unable to contact slurm controller", 1, Cause.CLUSTER,
         "Slurm did not start it"),
        (SAID + "Task launch for StepId=7.2 failed on node node3: Communication connection failure", 1, Cause.CLUSTER,
         "could not start"),
        (SAID + "Timed out waiting for job step to complete", 0, Cause.UNKNOWN, "gave up"),
        ("srun: unrecognized option '--foo'", 1, Cause.CODE, ""),
        ("", -9, Cause.UNKNOWN, ""),
    ],
)  # fmt: skip
def test_whose_failure_it_was(said: str, code: int, cause: Cause, reason: str) -> None:
    end = end_of_step(said + "\n", code)
    assert end.cause is cause and reason in end.reason
    assert end.is_refused == ("did not start" in reason)


def test_what_srun_says_is_known_though_its_log_can_not_be_written(tmp_path: Path) -> None:
    log = tmp_path / "srun.log"
    log.mkdir()  # as good as a full disk
    said = Said(log)
    assert said.fd is not None
    os.write(said.fd, b"srun: error: n1: task 0: Killed\n")
    assert [each.code for each in parse_exits(said.read(has_ended=False))] == [-9]
    log.rmdir()
    os.write(said.fd, b"srun: error: n2: task 1: Exited with exit code 3\n")
    text = said.read(has_ended=True)
    assert [each.code for each in parse_exits(text)] == [-9, 3]
    assert log.read_text() == text == said.read(has_ended=True) and said.fd is None


def test_a_step_that_said_nothing_and_whose_log_could_not_be_made_has_died_all_the_same(
    tmp_path: Path,
) -> None:
    Said(tmp_path / "srun.log")
    assert (tmp_path / "srun.log").read_text() == ""
    said = Said(tmp_path / "nowhere" / "srun.log")
    with subprocess.Popen(["true"]) as process:
        process.wait()
    handle = _StepHandle(process, tmp_path / "nowhere" / "srun.log", said, [tmp_path / "no" / "engine-0.log"])
    role = RunningRole(RoleProcess("engine", 0, ("engine",)), handle)
    assert "engine-0 exited with code 0. Its log" in str(failure([role])) and said.fd is None


def test_a_step_whose_credential_has_expired_is_the_clusters_failure(tmp_path: Path) -> None:
    """srun's 167 was taken for a signal that there is not, and ended the supervisor and the run."""
    words = "srun: error: Task launch for StepId=14.1 failed on node node2: Job credential expired"
    said = Said(tmp_path / "srun.log")
    with subprocess.Popen(["sh", "-c", f"echo '{words}'; exit 167"], stdout=said.fd) as process:
        process.wait()
    handle = _StepHandle(process, tmp_path / "srun.log", said, [tmp_path / "engine-0.log"])
    error = failure([RunningRole(RoleProcess("engine", 0, ("engine",)), handle)])
    assert "engine-0 exited with code 167: Slurm could not start it" in str(error)
    assert error.cause is Cause.CLUSTER
    assert describe_exit(-39) == "was killed by signal 39" and describe_exit(-9) == "was killed by SIGKILL"


def test_a_canary_that_slurm_did_not_start_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ended with 140, the number of Slurm's error 5004, which looks like SIGUSR2."""

    def says(words: str, code: int) -> _StepHandle:
        said = Said(tmp_path / "srun-canary.log")
        with subprocess.Popen(["sh", "-c", f"echo '{words}'; exit {code}"], stdout=said.fd) as process:
            process.wait()
        return _StepHandle(process, tmp_path / "srun-canary.log", said, [])

    monkeypatch.setattr(watch, "_FIRST_DELAY", 0.0)
    ends = iter(
        [
            says("srun: error: Task launch for StepId=3.9 failed on node n1: Socket timed out", 140),
            says("srun: error: n1: task 0: User defined signal 2", 1),
        ]
    )
    stops: list[str] = []
    watched = watch.Watch(
        [], None, SimpleNamespace(request_stop=stops.append), EventLog(tmp_path / "events.jsonl", 0),  # type: ignore[arg-type]
        StatusFile(tmp_path / "status.json", 0), None, 5.0, ends.__next__,  # type: ignore[arg-type]
    )  # fmt: skip
    watched._ask_canary()
    assert stops == []
    watched._ask_canary()
    assert stops == ["SIGUSR2 received"]


def test_a_supervisor_has_many_files_open_and_its_roles_the_limit_of_before() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(256, before[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        limit_again = allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
        limit_again()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == few
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_sigkill_was_for_memory_where_the_cgroup_says_so() -> None:
    assert [end_of_process(-9, known).cause for known in (True, False, None)] == [
        "code",
        "unknown",
        "unknown",
    ]
    assert end_of_process(3, False).cause is end_of_process(-11, None).cause is Cause.CODE


def test_a_job_that_finds_its_run_finished_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor before it was killed after the last step, and had no last word."""
    layout = RunLayout(tmp_path)
    write_finish(layout, Finish(steps=3, attempt=1))
    layout.status.write_text(json.dumps({"phase": "training", "step": 2, "attempt": 1}))
    config = SimpleNamespace(rollout=SimpleNamespace(num_rollout=3))
    monkeypatch.setattr("rltrain.arguments.load", lambda directory: config)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        plan: Any = None
        assert SlurmSupervisor(tmp_path, plan)()["state"] == "finished"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    said = json.loads(layout.status.read_text())
    assert (said["phase"], said["step"], said["attempt"]) == ("finished", 2, 1)
