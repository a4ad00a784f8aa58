"""Batch scripts: each kind of job against its golden script, and hostile values against shell and sbatch.

After a wanted change: `UPDATE_GOLDEN=1 pytest tests/slurm/test_slurm_template.py`, and read the difference.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from submitit.core.utils import DelayedSubmission, JobPaths, pickle_load

from hpc.planning.script import BatchScript
from hpc.sandbox import Sandbox
from hpc.signals import SignalPipe, hold_warning
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.partitions import Node, Partition
from hpc.submitting import slurm_job
from hpc.submitting.command_line import read_request
from hpc.submitting.executor import check_script
from rltrain import inputs
from rltrain.run.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
TRAIN = [
    *("--name=golden", "--runs-dir=/shared/runs", "--hf-checkpoint=/m", "--prompt-data=/p"),
    *("--rollout-batch-size=64", "--n-samples-per-prompt=8", "--num-rollout=9"),
]
CASES = {
    "het": ["--partition=gpu", "--nodes=4"],
    "plain": ["--partition=gpu", "--nodes=2", "--placement=plain", "--time=1:00:00"],
    "colocated": ["--partition=low", "--nodes=2", "--colocate", "--gpu-type=h100"],
    "one_node": ["--partition=gpu"],
    "engine_on_two_nodes": ["--partition=gpu", "--nodes=4", "--rollout-num-gpus-per-engine=8"],
    "each_role_its_own": [
        *("--partition=gpu", "--nodes=3", "--account=research", "--time=2:00:00", "--after", "1", "2"),
        *("--slurm.trainer.gpu-type=h100", "--slurm.trainer.mem=32G", "--slurm.trainer.constraint=h100"),
        *("--slurm.rollout.partition=low", "--slurm.rollout.gpu-type=a100", "--slurm.rollout.time=30"),
    ],
    "site": [
        *(
            "--partition=gpu",
            "--nodes=2",
            '--slurm.sbatch.comment=it\'s #1: "$(x)" \\ ü',
            "--slurm.sbatch.exclusive",
        ),
        *("--slurm.setup", "module load cuda/12.4", 'export PATH="$HOME/bin:$PATH"'),
        *("--slurm.env.NCCL_DEBUG=WARN", "--slurm.env.NOTE=it's; $(exit 7) #", "--slurm.python=python3"),
        *("--slurm.srun.container-image=nvcr.io#nvidia/pytorch:25.01-py3", "--slurm.srun.mpi=none"),
    ],
}


def node(number: int) -> Node:
    kind = "h100" if number <= 3 else "a100"
    return Node(
        name=f"node{number}", state="IDLE", reason=None, partitions=("gpu", "low"), cpus=16, memory_mb=64_000,
        gpus={kind: 4}, cpus_used=0, memory_used_mb=0, gpus_used={}, features=(kind,), address=f"127.0.1.{number}",
    )  # fmt: skip


def partition(name: str) -> Partition:
    return Partition(
        name=name, nodes=tuple(f"node{i}" for i in range(1, 7)), is_default=name == "gpu", state="UP",
        max_time_s=2 * 86400.0, default_time_s=3600.0, min_nodes=0, max_nodes=None, priority_tier=1,
        preempt_mode="OFF", grace_s=0, allow_accounts=None, allow_qos=None,
    )  # fmt: skip


FACTS = ClusterFacts(
    name="sandbox", version="22.05.8", partitions=(partition("gpu"), partition("low")),
    nodes=tuple(node(i) for i in range(1, 7)), preempt_type="preempt/partition_prio", job_requeue=True,
    kill_wait_s=30.0, has_accounting=True, accounts=("research", "teaching"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cluster_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_job, "read_facts", lambda client: FACTS)
    monkeypatch.setattr(inputs, "check_inputs", lambda args, to_come=None: args)


def script(*flags: str) -> str:
    request = read_request([*TRAIN, *flags])
    return slurm_job.plan_job(request.options, request.train).text()


@pytest.mark.parametrize("case", CASES)
def test_golden_scripts(case: str) -> None:
    path = GOLDEN / f"{case}.sbatch"
    text = script(*CASES[case]).replace(sys.executable, "PYTHON")
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_shellcheck_has_nothing_to_say(case: str) -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    # SC2016: that nothing is expanded between single quotes is what they are for.
    done = subprocess.run(
        [checker, "--exclude=SC2016", GOLDEN / f"{case}.sbatch"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slurm
@pytest.mark.parametrize("case", CASES)
def test_slurm_takes_the_golden_scripts(
    case: str, slurm_cluster: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")  # the script decides, not the environment
    text = (GOLDEN / f"{case}.sbatch").read_text()
    # sbatch --test-only looks dependencies up, and these jobs do not exist
    text = "".join(line for line in text.splitlines(keepends=True) if "--dependency" not in line)
    assert "to start at" in check_script(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition=gpuu"], "Did you mean gpu"),
        (["--partition=gpu", "--nodes=8"], r"8 nodes.*4 trainer \+ 4 rollout.*At most --nodes 6"),
        (["--partition=gpu", "--nodes=13"], r"13 nodes.*6 trainer \+ 7 rollout.*At most --nodes 6"),
        (["--partition=gpu", "--nodes=6", "--slurm.rollout.gpu-type=h100", "--slurm.trainer.gpu-type=h100"],
         "has 3 usable nodes"),
        (["--partition=gpu", "--nodes=8", "--slurm.rollout.partition=low"], "At most --nodes 6"),
        (["--partition=gpu", "--num-gpus-per-node=8"], "no node of partition gpu has more than 4"),
        (["--partition=gpu", "--gpu-type=h1000"], "Did you mean h100"),
        (["--partition=gpu", "--account=reserch"], "did you mean research"),
        (["--partition=gpu", "--time=3-0"], "at most 48 hours"),
        (["--partition=gpu", "--time=soon"], "not a time limit"),
        (["--partition=gpu", "--time=3"], "--time 3 leaves no time for a step.*Give --time 4 or more"),
        (["--partition=gpu", "--slurm.sbatch.cpus-per-task=2"], "cpus-per-task 2 is less than the 4 ranks.*task 4"),
        (["--partition=gpu", "--slurm.sbatch.nodes=3"], "follows from the plan.*--nodes"),
        (["--partition=gpu", "--slurm.sbatch.wait"], "submit does not work with sbatch's wait"),
        (["--partition=gpu", "--slurm.rollout.test-only"], "Use --test-only"),
        (["--partition=gpu", "--slurm.sbatch.gres=gpu:2,nvme:1"], "the plan sets the GPUs"),
        (["--partition=gpu", "--slurm.srn.mpi=none"], "did you mean slurm.srun"),
        (["--partition=gpu", "--slurm.sbatch.comment=a\nb"], "control characters"),
        (["--partition=gpu", "--slurm.env.A-B=1"], "variable"),
        (["--partition=gpu", "--slurm.sbatch.-x=1"], "can't be the name of a flag"),
    ],
)  # fmt: skip
def test_refused_before_sbatch(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(*flags)


hostile = st.text(
    st.sampled_from("ab \"'\\$`();#%&|*?~!{}[]<>=ü\n\t\x00\x1b\u2028") | st.characters(codec="utf-8")
)


def test_a_warning_before_the_supervisor_is_there_does_not_end_the_job() -> None:
    command, setup = "sh -c 'kill -USR2 $$; echo at work'", ("kill -USR2 $$",)
    text = BatchScript(({"nodes": "1"},), command, setup=setup).text()
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "at work\n")


def make_job(*, supervises: bool) -> Callable[[], tuple[list[str], str, bool]]:
    """What a job runs: it tells which signals have come, and who has SIGUSR2. Pickled by value."""

    class Job:
        takes_warnings = supervises

        def __call__(self) -> tuple[list[str], str, bool]:
            taker, mask = signal.getsignal(signal.SIGUSR2), signal.pthread_sigmask(signal.SIG_BLOCK, [])
            if not self.takes_warnings:
                return [], taker.__name__, signal.SIGUSR2 in mask
            hold_warning()
            with SignalPipe(signal.SIGUSR2) as pipe:
                return [each.name for each in pipe.wait(5.0)], "", False

    return Job()


EARLY = ("in the script", "while Python starts")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the script", "while Python starts", "never", "to another function"])
def test_an_early_warning_reaches_the_supervisor(tmp_path: Path, moment: str) -> None:
    """It was lost, and Slurm ended the job at its time limit, for good."""
    paths, job = JobPaths(tmp_path, job_id="7", task_id=0), make_job(supervises=moment in EARLY)
    DelayedSubmission(job).dump(paths.submitted_pickle)
    paths.submitted_pickle.chmod(0o600)
    begin = f"exec {sys.executable} -m hpc.batch {tmp_path}"
    command = (
        f"bash -c 'kill -USR2 $$; {begin}'"
        if moment == "while Python starts"
        else begin.removeprefix("exec ")
    )
    setup = ("kill -USR2 $$",) if moment in ("in the script", "to another function") else ()
    if moment == "while Python starts" and not can_hold():
        pytest.skip("env of coreutils before 8.31")
    text = BatchScript(({"nodes": "1"},), command, {"SUBMITIT_EXECUTOR": "slurm"}, setup).text()
    alone = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    done = subprocess.run(["bash", "-c", text], env={**os.environ, **alone}, capture_output=True, text=True)
    if moment == "to another function":  # which submitit can't requeue, and says so
        outcome, said = pickle_load(paths.result_pickle)
        assert (outcome, done.returncode) == ("error", 1) and "Job not requeued" in said
        return
    assert done.returncode == 0, done.stderr
    expected = ([], "checkpoint_and_try_requeue", False) if moment == "never" else (["SIGUSR2"], "", False)
    assert pickle_load(paths.result_pickle) == ("success", expected)


def can_hold() -> bool:
    return subprocess.run(["env", "--block-signal=USR2", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(value=hostile)
def test_hostile_variables_reach_the_job_or_are_refused(value: str) -> None:
    try:
        text = BatchScript(({"nodes": "1"},), 'printf %s "$X"', env={"X": value}).text()
    except UserError:
        assert "\x00" in value
        return
    ran = subprocess.run(["bash"], input=text.encode(), capture_output=True, check=True)
    assert ran.stdout == value.encode()


@pytest.mark.slurm
def test_hostile_values_reach_slurm_unchanged(slurm_cluster: Sandbox, tmp_path: Path) -> None:
    values = [
        'it\'s "quoted"',
        "$(touch /tmp/owned)",
        "`id`; rm -rf x",
        "a#b",
        "back\\slash\\",
        "ünï",
        "a\\",
        '\\"',
        "*?~",
    ]
    for value in values:
        path = tmp_path / "script"
        path.write_text(BatchScript(({"comment": value, "partition": "gpu", "hold": True},), "true").text())
        job = slurm_cluster.run("sbatch", "--parsable", "--output=/dev/null", str(path)).strip()
        shown = slurm_cluster.run("scontrol", "show", "job", "-o", job)
        slurm_cluster.run("scancel", job)
        assert f"Comment={value} " in shown + " "
