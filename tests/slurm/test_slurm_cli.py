"""The verbs on whole Slurm jobs with fake roles: stop, look, go on; chains of spare jobs; two users on one node."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.slurm_fixture import open_directory, until, wait_for
from helpers.slurm_job import SERVICES, FakeRun

from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient
from hpc.slurm.states import JobState
from hpc.status import RunStatus, status
from rltrain.run.layout import RunLayout

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
FAKE_RESUBMIT = Path(__file__).parents[1] / "fakes" / "resubmit.py"


def verb(job: FakeRun, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"hpc.{module}", "job", *words]
    env = {**os.environ, **job.cluster.env}
    return subprocess.run(command, cwd=job.directory, env=env, capture_output=True, text=True, timeout=240)


def resubmit(job: FakeRun, *words: str, **roles: list[str]) -> subprocess.CompletedProcess[str]:
    fake = {"FAKE_PLAN": json.dumps({**SERVICES, **roles}), "FAKE_ENGINES": "2"}
    command = [sys.executable, str(FAKE_RESUBMIT), "job", *words]
    env = {**job.cluster.env, **fake}
    return subprocess.run(command, cwd=job.directory, env=env, capture_output=True, text=True, timeout=240)


def look(job: FakeRun) -> RunStatus:
    [found] = status(runs_dir=job.layout.root.parent, client=SlurmClient(job.cluster.env))
    return found


def test_stop_look_and_go_on(run: FakeRun) -> None:
    first = run.detach("--nodes=4", steps=1000)
    follow = [sys.executable, "-m", "hpc.logs", "job", "-f", "--role=supervisor"]
    env = {**os.environ, **run.cluster.env}
    with subprocess.Popen(follow, cwd=run.directory, env=env, stdout=subprocess.PIPE, text=True) as follower:
        until(lambda: run.steps(), 120, "the first step")
        running = look(run)
        assert (running.state, running.job_id, running.spare_jobs) == ("RUNNING", first.job_id, 0)
        refused = resubmit(run)
        assert refused.returncode == 2 and f"RUNNING as job {first.job_id}" in refused.stderr

        cancelled = verb(run, "cancel")
        assert cancelled.returncode == 0 and "saves" in cancelled.stdout, cancelled.stderr
        output, _ = follower.communicate(timeout=240)
        assert follower.returncode == 0
    assert "started router-0" in output and "got SIGINT" in output
    # To Slurm it failed, so that no job that waits for it to end well begins; to us it is a run that was stopped.
    wait_for(run.cluster, first.job_id, JobState.FAILED)
    assert look(run).state == "stopped"
    done = len(run.steps())

    again = resubmit(run, f"--num-rollout={done + 3}")  # nodes and partition are the run's
    assert again.returncode == 0, again.stderr
    assert run.steps() == list(range(done + 3))
    assert [entry["layout"] for entry in run.entries()] == ["het", "het"]
    assert (look(run).state, look(run).step) == ("finished", done + 3)

    def jobs_in_accounting() -> list[str]:
        table = json.loads(verb(run, "accounting", "--json").stdout or "[]")
        return list(dict.fromkeys(row["job_id"] for row in table if row["ended"]))

    until(lambda: len(jobs_in_accounting()) == 2, 120, "slurmdbd to hear of both jobs")
    assert "GPU-hours in all" in verb(run, "accounting").stdout


def test_spare_jobs_take_over_and_those_not_needed_end(run: FakeRun) -> None:
    first = run.detach("--nodes=4", steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    verb(run, "cancel")
    wait_for(run.cluster, first.job_id)
    total = len(run.steps()) + 10
    chained = resubmit(run, "--chain=2", f"--num-rollout={total}", trainer=["pause"])
    assert chained.returncode == 0, chained.stderr
    jobs = [entry["job_id"] for entry in run.entries()]
    assert len(jobs) == 4 and f"spare job 2 of 2: {jobs[3]}, after {jobs[2]}" in chained.stdout
    until(lambda: len(run.events("attempt_started")) == 2, 120, "the second attempt")
    assert (look(run).job_id, look(run).spare_jobs) == (jobs[1], 2)
    run.cluster.run("scancel", jobs[1])  # as a partition does that cancels what it preempts
    until(lambda: len(run.events("attempt_started")) == 3, 240, "the third attempt")
    run.go_on()

    assert wait_for(run.cluster, jobs[3], timeout=180).state is JobState.COMPLETED
    assert len(run.events("attempt_started")) == 3
    assert run.steps() == list(range(total))
    assert look(run).state == "finished"


def test_spare_jobs_do_not_repeat_what_can_not_work(run: FakeRun) -> None:
    code, out, err = run.finish("--nodes=4", "--chain=1", trainer=["never_again"])
    assert code == 0, err
    first, spare = (entry["job_id"] for entry in run.entries())
    assert f"spare job 1 of 1: {spare}, after {first}" in out
    assert (
        wait_for(run.cluster, spare, timeout=180).state is JobState.FAILED
    )  # so that --after it nothing begins
    assert len(run.events("attempt_started")) == 1
    assert "in the same way" in run.events("not_started")[0]["reason"]
    assert "nothing is started" in run.output()
    status = look(run)
    # Both ranks do, one of them first; what it said is there if its log is.
    ended = re.fullmatch(
        r"trainer-[01] exited with code 93(: the prompts are no prompts)?", status.reason or ""
    )
    assert status.state == "FAILED" and ended, status.reason


def test_the_first_line_that_a_new_user_types(slurm_cluster: Sandbox, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpc.submit", "--partition=gpu", "--nodes=4", "--test-only"]
    env = {**slurm_cluster.env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("to start at") == 2  # SFT, then GRPO
    assert "4 nodes: 2 for training (1 rank each), 2 for rollout (1 engine each)" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-data"]


def test_sweep(run: FakeRun) -> None:
    sweep = ("--sweep", "seed=1,2,3", "--sweep-parallel=2", "--nodes=2", "--colocate")
    code, _, err = run.finish(*sweep, steps=8, trainer=["pause"])
    assert code == 0, err
    layouts = [RunLayout(run.layout.root.parent / f"job.seed-{seed}") for seed in (1, 2, 3)]
    jobs = [json.loads(layout.job.read_text())[0]["job_id"] for layout in layouts]
    waiting = run.cluster.run("squeue", "-h", "-j", jobs[2], "-o", "%E")
    assert f"afterany:{jobs[0]}" in waiting
    run.cluster.run("scontrol", "hold", jobs[2])
    again, out, err = run.finish(
        *sweep, steps=8, trainer=["pause"]
    )  # it waits, and the others run or are done: none is submitted
    assert again == 0 and f"job.seed-3 has a job already: {jobs[2]}" in out, out + err
    assert [len(json.loads(layout.job.read_text())) for layout in layouts] == [1, 1, 1]
    run.cluster.run("scontrol", "release", jobs[2])
    for layout in layouts:
        (layout.root / "go_on").touch()
    names = [each.name for each in status(["job.*"], run.layout.root.parent, SlurmClient(run.cluster.env))]
    assert sorted(names) == [layout.name for layout in layouts]
    for job, layout in zip(jobs, layouts, strict=True):
        assert wait_for(run.cluster, job).state is JobState.COMPLETED
        assert len(layout.metrics.read_text().splitlines()) == 8
    assert 'seed = "3"' in layouts[2].config.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs of other users")
def test_second_user_on_the_node_is_kept_out(run: FakeRun, idle_cluster: Sandbox) -> None:
    run.directory.chmod(0o755)  # a home directory that others may enter
    run.layout.root.parent.mkdir(exist_ok=True)
    run.layout.root.parent.chmod(0o755)
    job = run.detach("--nodes=4", steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    environ = _environment_of_a_role(run)
    node = next(event["host"] for event in run.events("role_ready") if event["role"] == "trainer")
    python = shutil.which("python3", path="/usr/bin:/bin")
    assert python
    with open_directory() as shared:
        program = shared / "intrude.py"
        program.write_text(_INTRUDER)
        words = [python, str(program), str(run.layout.root), environ["SLURMLIME_REGISTRY"]]
        own = idle_cluster.run("srun", "-w", node, "--overlap", "-N1", "-n1", "--chdir=/tmp", *words)
        other = idle_cluster.run("srun", "-w", node, "-N1", "-n1", "--chdir=/tmp", *words, user="games")
    # the owner can look at the files and the processes, but without the token the registry answers nobody
    assert json.loads(own) == {"user": 0, "listed": True, "tokens": True, "registry": [401, 401]}
    assert {**json.loads(other), "user": None} == {
        "user": None, "listed": False, "tokens": False, "registry": [401, 401],
    }  # fmt: skip
    assert json.loads(other)["user"] != 0
    job.cancel()


def test_two_jobs_on_one_node_do_not_meet(run: FakeRun) -> None:
    other = FakeRun(run.directory / "other", run.cluster)
    other.directory.mkdir()
    place = ("--nodes=1", "--colocate", "--num-gpus-per-node=2", "--slurm.sbatch.nodelist=node1")
    jobs = [each.detach(*place, "--slurm.sbatch.cpus-per-task=2", steps=1000) for each in (run, other)]
    for each in (run, other):
        until(lambda each=each: each.steps(), 120, "the first step")
    assert {e["host"] for each in (run, other) for e in each.events("role_ready")} == {"node1"}
    mine, theirs = _environment_of_a_role(run), _environment_of_a_role(other)
    assert mine["SLURMLIME_TOKEN"] != theirs["SLURMLIME_TOKEN"]
    codes = {
        name: _ask(environ["SLURMLIME_REGISTRY"], mine["SLURMLIME_TOKEN"])
        for name, environ in (("own", mine), ("other", theirs))
    }
    assert codes == {"own": 200, "other": 401}
    for job in jobs:
        job.cancel()


def _ask(registry: str, token: str) -> int:
    request = urllib.request.Request(f"{registry}/stop", headers={"Authorization": f"Bearer {token}"})
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


_INTRUDER = """
import json, os, pathlib, sys, urllib.error, urllib.request
root, registry = pathlib.Path(sys.argv[1]), sys.argv[2]

def listed():
    try:
        return bool(list(root.iterdir()))
    except PermissionError:
        return False

def tokens():
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"SLURMLIME_TOKEN=" in path.read_bytes():
                return True
        except OSError:
            continue
    return False

def code(token):
    headers = {"Authorization": token} if token else {}
    request = urllib.request.Request(registry + "/roles/trainer?count=1", headers=headers)
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code

answers = [code(None), code("Bearer x")]
print(json.dumps({"user": os.getuid(), "listed": listed(), "tokens": tokens(), "registry": answers}))
"""


def _environment_of_a_role(job: FakeRun) -> dict[str, str]:
    """The variables of a role of this run, which only its owner (and root) can read."""
    wanted = f"SLURMLIME_RUN_DIR={job.layout.root}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in words:
            return dict(word.decode().split("=", 1) for word in words if b"=" in word)
    raise AssertionError("no role of the run was found")
