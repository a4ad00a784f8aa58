"""Whole jobs on a real Slurm, with small stand-ins for the roles (tests/fakes)."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.run_files import lines_of
from helpers.slurm_fixture import submit as submit_script
from helpers.slurm_fixture import until, wait_for
from helpers.slurm_job import FakeRun

from hpc.slurm.states import JobState
from rltrain.run.layout import RunLayout

pytestmark = pytest.mark.slurm

LAYOUTS = {
    "het": ["--nodes=4"],
    "plain": ["--nodes=4", "--placement=plain"],
    "colocated": ["--nodes=2", "--colocate"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_job_finishes_and_engines_and_router_clean_up_on_their_nodes(run: FakeRun, layout: str) -> None:
    code, out, err = run.finish(*LAYOUTS[layout], engine=["clean_up"], router=["clean_up"])
    assert code == 0, err + run.output()
    logs = [run.layout.log_dir(0) / f"{name}.log" for name in ("engine-0", "engine-1", "router-0")]
    marks = [Path(mark) for log in logs for mark in re.findall(r"^mark: (.+)$", log.read_text(), re.M)]
    assert len(set(marks)) == 3 and {mark.parent for mark in marks} == {run.layout.root}
    assert list(run.layout.root.glob("slurmlime-*")) == []
    assert "step 3/3" in out and "is completed" in out
    assert run.steps() == [0, 1, 2]
    (entry,) = run.entries()
    assert entry["layout"] == layout and len(entry["components"]) == (2 if layout == "het" else 0)

    hosts = {f"{e['role']}-{e['index']}": e["host"] for e in run.events("role_ready")}
    assert hosts["router-0"] == hosts["rollout-0"] == hosts["engine-0"] != hosts["engine-1"]
    shared = {hosts["trainer-0"]} & {hosts["engine-0"], hosts["engine-1"]}
    assert bool(shared) == (layout == "colocated")

    job = run.job()
    assert job.result()["state"] == "finished" and job.state == "COMPLETED" and job.done()
    assert "Job completed successfully" in (job.stdout() or "") + (job.stderr() or "")
    assert {path.stem for path in run.layout.log_dir(0).glob("trainer-*.log")} == {"trainer-0", "trainer-1"}


def test_role_that_dies_ends_the_job_in_seconds(run: FakeRun) -> None:
    code, _, err = run.finish("--nodes=4", "--max-engine-restarts=0", engine=["serve", "die"], steps=1000)
    assert code == 1
    assert "engine-1 exited with code 3" in err and "the engine has no memory left" in err
    died, finished = run.events("role_died")[0], run.events("attempt_finished")[0]
    assert (died["role"], died["index"], died["exit_code"]) == ("engine", 1, 3)
    assert finished["time"] - died["time"] < 30
    assert wait_for(run.cluster, run.entries()[-1]["job_id"]).state is JobState.FAILED
    with pytest.raises(Exception, match="the engine has no memory left"):
        run.job().result()


def test_engine_that_dies_is_started_again_alone(run: FakeRun) -> None:
    def ready() -> list[str]:
        return [e["host"] for e in run.events("role_ready") if (e["role"], e["index"]) == ("engine", 1)]

    code, out, err = run.finish_after(lambda: len(ready()) == 2, "--nodes=4", engine=["serve", "die_once"])
    assert code == 0, err + run.output()
    assert "engine-1 is started again" in out
    assert [(e["role"], e["index"]) for e in run.events("role_died")] == [("engine", 1)]
    first, second = ready()
    assert first == second
    assert run.steps() == list(range(8)) and len(run.events("attempt_started")) == 1


def test_engine_of_which_a_part_dies_is_started_again_as_a_whole(run: FakeRun) -> None:
    size = ("--nodes=3", "--rollout-num-gpus-per-engine=2")
    logs = [run.layout.log_dir(0) / f"engine-0{part}.log" for part in ("", ".node1")]

    def starts() -> list[int]:
        return [log.read_text().count("part") if log.exists() else 0 for log in logs]

    code, _, err = run.finish_after(lambda: starts() == [2, 2], *size, engine=["part_dies_once"], engines=1)
    assert code == 0, err + run.output()
    assert [(e["role"], e["index"]) for e in run.events("role_died")] == [("engine", 0)]
    assert starts() == [2, 2]
    assert run.steps() == list(range(8))


def test_rank_that_dies_is_named(run: FakeRun) -> None:
    code, _, err = run.finish("--nodes=4", trainer=["train", "die"], steps=1000)
    assert code == 1 and "trainer-1 exited with code 3" in err and "trainer-1.log" in err


def test_ctrl_c_only_stops_looking(run: FakeRun) -> None:
    process = run.start("--nodes=4", steps=10, trainer=["pause"])
    until(lambda: run.steps(), 120, "the first step")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "keeps running" in out and "hpc.cancel" in out
    code, _, err = run.finish("--nodes=4")
    assert code == 2 and "which is RUNNING" in err
    run.go_on()
    assert run.job().result()["state"] == "finished"
    assert run.steps() == list(range(10))


def test_cancelled_job_stays_cancelled_and_saves(run: FakeRun) -> None:
    job = run.detach("--nodes=4", steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    job.cancel()
    assert wait_for(run.cluster, job.job_id).state is JobState.CANCELLED
    until(lambda: run.events("attempt_finished"), 120, "the supervisor's last word")
    time.sleep(2)
    assert wait_for(run.cluster, job.job_id).state is JobState.CANCELLED
    assert (run.layout.checkpoints / "latest_checkpointed_iteration.txt").exists()


def test_int_saves_and_ends(run: FakeRun) -> None:
    job = run.detach("--nodes=4", steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    run.cluster.run("scancel", "--batch", "--signal=INT", job.job_id)
    report = job.result()
    assert report["state"] == "stopped" and report["saved"] and report["signal"] == "SIGINT"
    assert run.events("not_requeued")[0]["reason"] == "stopped on request"
    # A job that waits for this one to end well must not start.
    assert wait_for(run.cluster, job.job_id).state is JobState.FAILED


@pytest.mark.parametrize(
    ("layout", "partition"),
    # With a grace time the others are preempted in test_slurm_real.py.
    [("het", "low"), ("plain", "low"), ("colocated", "low"), ("het", "lowgrace")],
)
def test_preempted_job_goes_on_without_gap_or_repeat(run: FakeRun, layout: str, partition: str) -> None:
    job = run.detach(*LAYOUTS[layout], steps=30, partition=partition, trainer=["hurry"])
    until(lambda: len(run.steps()) > 3, 120, "some steps")
    node = next(event["host"] for event in run.events("role_ready") if event["role"] == "engine")
    rival = submit_script(run.cluster, "sleep 3", "-p", "high", "-w", node, "--exclusive")
    until(lambda: run.events("requeued") or len(run.events("attempt_started")) > 1, 120, "a second attempt")
    assert job.result()["state"] == "finished", run.output()
    assert run.steps() == list(range(30))
    attempts = [row["attempt"] for row in lines_of(run.layout.metrics)]
    assert attempts[0] == 0 and attempts[-1] == 1
    assert len(run.events("stop_requested")) == 1
    wait_for(run.cluster, rival)


def test_time_limit(run: FakeRun) -> None:
    """The warning comes to the first attempt while it trains, and to the second before its supervisor is there."""
    early = '--slurm.setup=[ "$SLURM_RESTART_COUNT" != 1 ] || kill -USR2 $$'
    job = run.detach("--nodes=4", "--time=5", early, steps=3000)
    until(lambda: run.steps(), 120, "the first step")
    run.cluster.run("scancel", "--batch", "--signal=USR2", job.job_id)
    until(lambda: len(run.events("attempt_started")) == 3, 120, "a third attempt")
    assert [each["reason"] for each in run.events("requeued")] == ["the time limit is near"] * 2
    trained = len(run.steps())
    until(lambda: len(run.steps()) > trained, 120, "steps of the third attempt")
    steps = run.steps()
    assert steps == list(range(len(steps)))
    job.cancel()


def test_node_that_dies(run: FakeRun) -> None:
    job = run.detach("--nodes=4", steps=30, trainer=["hurry"])
    until(lambda: len(run.steps()) > 3, 120, "some steps")
    host = next(event["host"] for event in run.events("role_ready") if event["role"] == "engine")
    other = next(event["host"] for event in run.events("role_ready") if event["role"] == "trainer")
    now, day = time.time(), 24 * 3600
    for node, ages in [(host, [3600]), (other, [3600 + day, 7200 + day])]:  # what earlier attempts have seen
        for age in ages:
            event = {"time": now - age, "attempt": 0, "kind": "node_failed", "node": node}
            with run.layout.events.open("a") as file:
                file.write(json.dumps(event) + "\n")
    run.cluster.power_off(host)
    until(lambda: run.cluster.run("squeue", "-h", "-j", job.job_id, "-t", "PENDING"), 240, "the requeue")
    run.cluster.power_on(host)
    assert job.result()["state"] == "finished", run.output()
    assert len(run.events("attempt_started")) == 2
    assert run.steps()[-1] == 29
    # It has failed twice within a day, so the job does without it although it is back.
    second = {event["host"] for event in run.events("role_ready") if event["attempt"] == 1}
    assert host not in second and other in second
    shown = run.cluster.run("scontrol", "show", "job", job.job_id)
    assert f"ExcNodeList={host}" in shown


def test_half_requeued_job_is_started_as_a_whole(run: FakeRun) -> None:
    """Slurm requeues a component alone if its only node dies, while the others keep running."""
    job = run.detach("--nodes=3", steps=30, trainer=["hurry"])
    until(lambda: len(run.steps()) > 3, 120, "some steps")
    trainer = next(event["host"] for event in run.events("role_ready") if event["role"] == "trainer")
    run.cluster.power_off(trainer)
    assert job.result()["state"] == "finished", run.output()
    assert run.steps()[-1] == 29
    assert len(run.events("attempt_started")) == 2  # the lone component did not count as one


def test_where_the_site_cancels_instead_of_requeueing(run: FakeRun) -> None:
    job = run.detach("--nodes=4", "--max-restarts=0", steps=30, partition="lowcancel", trainer=["hurry"])
    until(lambda: len(run.steps()) > 3, 120, "some steps")
    node = next(event["host"] for event in run.events("role_ready") if event["role"] == "engine")
    rival = submit_script(run.cluster, "sleep 1", "-p", "high", "-w", node, "--exclusive")
    until(lambda: run.events("not_requeued"), 120, "the supervisor's decision")
    assert (run.layout.checkpoints / "latest_checkpointed_iteration.txt").exists()
    wait_for(run.cluster, rival)
    wait_for(run.cluster, job.job_id)
    code, _, err = run.finish("--nodes=4", steps=30, trainer=["hurry"])
    assert code == 0, err
    assert run.steps() == list(range(30)) and len(run.entries()) == 2


def test_crash_loop_ends(run: FakeRun) -> None:
    code, *_ = run.finish("--nodes=4", "--max-failures=2", rollout=["die"], steps=10_000, timeout=300)
    assert code == 1
    assert len(run.events("attempt_started")) == 2
    assert "2 attempts in a row failed" in run.events("not_requeued")[0]["reason"]


def test_a_step_that_slurm_gave_up_does_not_finish_the_run(run: FakeRun) -> None:
    """srun exits with 0 then, as the trainer of the first attempt does here, and nobody has said that all is done."""
    code, _, err = run.finish("--nodes=4", trainer=["leave_early"], steps=3, timeout=300)
    assert code == 0, err + run.output()
    assert run.events("requeued")[0]["reason"] == "an attempt ended for an unknown reason"
    assert run.steps() == [0, 1, 2] and len(run.events("attempt_started")) == 2


def test_token_is_nowhere_to_be_seen(run: FakeRun) -> None:
    job = run.detach("--nodes=4", steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    pid = run.events("role_started")[0]["pid"]
    environments = [_read(path) for path in Path("/proc").glob("[0-9]*/environ")]
    words = {
        word
        for environment in environments
        for word in environment.split(b"\0")
        if bytes(run.layout.root) in environment and word.startswith(b"SLURMLIME_TOKEN=")
    }
    (token,) = {word.partition(b"=")[2] for word in words}
    shown = run.cluster.run("scontrol", "show", "job", job.job_id) + run.cluster.run(
        "scontrol", "show", "step"
    )
    argv = b"".join(map(_read, Path("/proc").glob("[0-9]*/cmdline")))
    written = b"".join(path.read_bytes() for path in run.layout.root.rglob("*") if path.is_file())
    assert pid and len(token) > 30
    assert token not in shown.encode() + argv + written
    assert run.layout.root.stat().st_mode & 0o777 == 0o700
    job.cancel()


def _read(path: Path) -> bytes:
    """Nothing of a process that has ended, or is another user's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_after(run: FakeRun) -> None:
    first = run.detach("--nodes=4", steps=40)
    code, _, err = run.finish("--nodes=4", "--name=second", f"--after={first.job_id}", steps=2)
    assert code == 0, err
    assert wait_for(run.cluster, first.job_id).state is JobState.COMPLETED
    second = RunLayout(run.layout.root.parent / "second")
    begun = json.loads(second.metrics.read_text().splitlines()[0])["attempt"]
    assert begun == 0 and run.steps() == list(range(40))
