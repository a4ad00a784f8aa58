"""A run of version 0.1 (tests/recorded/version_0_1): its waiting jobs and its directory are still understood."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.run_files import lines_of
from helpers.slurm_fixture import until

from analysis import load_run
from hpc.batch import accept_moved_modules
from hpc.runs.find import read_run
from hpc.sandbox import Sandbox
from hpc.status import status
from hpc.submitting.command_line import stored_options
from hpc.submitting.run_dir import stored_flags
from hpc.submitting.slurm_job import plan_job
from hpc.supervisor.restart import Limits
from hpc.supervisor.slurm_supervisor import SlurmSupervisor
from rltrain import arguments
from rltrain.functions import load_function
from rltrain.run.finished import Finish, write_finish
from rltrain.run.layout import RunLayout

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "recorded" / "version_0_1" / "add"
PLACE = "version_0_1"  # directory of /tmp in which it was made
SPARE_JOB = 3  # never began
TEXTS = (".toml", ".json", ".jsonl", ".sbatch", ".pkl", ".log")


@pytest.fixture
def layout() -> Iterator[RunLayout]:
    """The run, in a directory of /tmp whose name is as long as that in the payload."""
    name = f"run{secrets.token_hex(4)}"
    assert len(name) == len(PLACE)
    place = Path("/tmp") / name
    place.mkdir(mode=0o755)
    try:
        run = place / "runs" / "add"
        shutil.copytree(RECORDED, run)
        for path in run.rglob("*"):
            if path.suffix in TEXTS:
                path.write_bytes(path.read_bytes().replace(PLACE.encode(), name.encode()))
        yield RunLayout(run)
    finally:
        shutil.rmtree(place)


def make_inputs(layout: RunLayout, model: Path) -> Path:
    """The model and the prompts that the run's flags name; returns their directory."""
    place = layout.root.parents[1]
    shutil.copytree(model, place / "model")
    rows = [{"input": f"{i}+{i % 7}=", "label": str(i + i % 7)} for i in range(20)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def silent_slurm(tmp_path: Path) -> str:
    """A PATH on which Slurm answers, but has forgotten every job, and takes no new one."""
    for name, answer in {"squeue": "", "scontrol": "ClusterName = sandbox"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{_without_slurm(os.environ['PATH'])}"


def _without_slurm(path: str) -> str:
    return ":".join(each for each in path.split(":") if not (Path(each) / "sbatch").exists())


def payload(layout: RunLayout, job: int) -> Any:
    accept_moved_modules()
    return pickle.loads((layout.submitit / f"{job}_submitted.pkl").read_bytes()).function


@pytest.mark.parametrize("job", [1, SPARE_JOB])
def test_payload_is_the_supervisor_of_the_same_processes(
    layout: RunLayout, job: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = payload(layout, job)
    monkeypatch.setenv("PATH", _without_slurm(os.environ["PATH"]))
    options = dataclasses.replace(stored_options(layout), dry_run=True)
    planned = plan_job(options, stored_flags(layout), check=lambda args: args)
    assert supervisor == SlurmSupervisor(
        layout.root, planned.plan, stop_grace=planned.lead - 10.0, python="python3", limits=Limits(100, 1)
    )


def test_programs_of_the_payload_can_be_started(layout: RunLayout) -> None:
    programs = {process.argv for process in payload(layout, SPARE_JOB).plan.processes}
    assert len(programs) == 4
    for python, flag, module in programs:
        assert (python, flag) == ("python3", "-m")
        assert importlib.util.find_spec(module) is not None
    assert importlib.util.find_spec("rltrain.rollout.__main__") is not None
    assert importlib.util.find_spec("rltrain.rollout_only") is not None  # of a run with --debug-rollout-only


def test_batch_runs_the_payload(layout: RunLayout) -> None:
    """Of a run that is finished by now: the job ends well at once, and nothing is started."""
    write_finish(layout, Finish(60, attempt=0, checkpoint=60))
    env = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": str(SPARE_JOB), "SLURM_JOB_NUM_NODES": "1"}
    env |= {"SLURM_NTASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    command = [sys.executable, "-m", "hpc.batch", str(layout.submitit)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env, "SLURM_NODELIST": "node1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcome, report = pickle.loads((layout.submitit / f"{SPARE_JOB}_0_result.pkl").read_bytes())
    assert (outcome, report["state"]) == ("success", "finished")
    assert layout.attempts() == [0]


def test_files_are_read_as_before(
    layout: RunLayout, silent_slurm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read_run(layout)
    assert (record.state, record.step, record.num_rollout, record.attempts) == ("stopped", 3, 60, 1)
    assert [job.job_id for job in record.slurm_jobs] == ["1", "3"]
    monkeypatch.setenv("PATH", silent_slurm)
    [found] = status(runs_dir=layout.root.parent)
    assert (found.name, found.state, found.step, found.job_id) == ("add", "stopped", 3, "3")
    run = load_run(layout.root)
    assert list(run.steps.step) == [0, 1, 2]
    assert len(run.samples) == 3 * 8


def test_configuration_is_read_as_before(layout: RunLayout) -> None:
    args = arguments.load(layout.root)
    assert (args.rollout.num_rollout, args.optimizer.lr, args.rollout.rollout_batch_size) == (60, 1e-3, 4)
    for path in (
        args.functions.rollout_function_path,
        args.functions.data_source_path,
        args.functions.custom_rm_path,
    ):
        assert callable(load_function(path, flag="flag"))


def test_resubmit_writes_the_same_script(layout: RunLayout, tiny_tokenizer: Path, silent_slurm: str) -> None:
    place = make_inputs(layout, tiny_tokenizer)
    command = [
        sys.executable,
        "-m",
        "hpc.resubmit",
        "add",
        f"--runs-dir={layout.root.parent}",
        "--dry-run",
        "--random-init",
    ]
    env = {**os.environ, "PATH": silent_slurm, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Without a cluster to ask the nodes' CPUs are not known; only a spare job waits for another one.
    expected = re.sub(r"#SBATCH --(cpus-per-task|dependency)=.*\n", "", layout.script.read_text())
    # Since then a warning is kept that comes before the supervisor can take it.
    written = re.sub(r"# A warning that comes before .*\ntrap .* USR2\n", "", done.stdout)
    written = re.sub(r"# While Python starts it waits.*\nenv .*\ntrap '' USR2\n", "", written)
    assert re.sub(r"exec (\$\{.*\} )?\S+ ", "exec python3 ", written) == expected


@pytest.mark.slurm
@pytest.mark.slow
def test_waiting_job_starts_the_roles(layout: RunLayout, tiny_model: Path, idle_cluster: Sandbox) -> None:
    """The script and the payload as they are, in a Slurm of today; it begins anew, because it has no checkpoint."""
    path = f"{Path(sys.executable).parent}:{idle_cluster.env['PATH']}"
    env = {**idle_cluster.env, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = re.sub(r"#SBATCH --(cpus-per-task|dependency)=.*\n", "", layout.script.read_text())
    layout.script.write_text(script)
    place = make_inputs(layout, tiny_model)
    held = ["sbatch", "--parsable", "--hold", str(layout.script)]
    job = subprocess.run(held, env=env, cwd=place, check=True, capture_output=True, text=True).stdout.strip()
    shutil.move(layout.submitit / f"{SPARE_JOB}_submitted.pkl", layout.submitit / f"{job}_submitted.pkl")
    idle_cluster.run("scontrol", "release", job)

    def steps() -> list[tuple[int, int]]:
        return [(row["attempt"], row["step"]) for row in lines_of(layout.metrics)]

    until(lambda: (1, 1) in steps(), 240, "two steps of the second attempt")
    idle_cluster.run("scontrol", "requeue", job)
    until(lambda: steps()[-1][0] == 2, 240, "a step of the requeued attempt")
    own = [step for attempt, step in steps() if attempt]
    assert own == list(range(len(own)))  # it went on from what the second attempt had saved
    idle_cluster.run("scancel", "--batch", "--signal=INT", job)
    until(lambda: json.loads(layout.status.read_text())["phase"] == "stopped", 240, "the stop")
