"""`hpc.submit` before anything is started: dry runs, bad input, the run directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.run_files import LEAST

from hpc.planning.request import SubmitOptions
from hpc.submit import main
from hpc.submitting import demo, run_dir, start_run
from hpc.submitting.command_line import read_request
from rltrain import arguments, inputs
from rltrain.arguments.config import Config
from rltrain.run.errors import UserError
from rltrain.run.finished import Finish, is_finished, write_finish
from rltrain.run.layout import RunLayout

ROOT = Path(__file__).parents[2]
FLAGS = [*LEAST[:-1], "5"]  # rollouts
FAILING = """
import sys
from hpc import cli
from rltrain.run.errors import UserError

def main(argv):
    print("a line")
    raise UserError("sbatch refused")

sys.exit(cli.run_main(main))
"""
HEAVY = {"torch", "pandas", "pyarrow", "wandb", "submitit", "rich", "numpy", "transformers"}


@pytest.fixture(autouse=True)
def _unchecked_inputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files that flags name are checked elsewhere; here they need not exist."""
    monkeypatch.setattr(inputs, "check_inputs", lambda args, to_come=None: args)
    monkeypatch.setattr(start_run.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)


def submit(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["submit", *argv])
    return main()


@pytest.fixture
def nobody() -> Iterator[int]:
    """A pipe whose reader has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("module", ["hpc.sandbox", "hpc.logs"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(module: str, nobody: int) -> None:
    command = [sys.executable, "-m", module, "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, cwd=ROOT, env=buffered, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def test_a_reader_that_has_seen_enough_of_a_dry_run(monkeypatch: pytest.MonkeyPatch, nobody: int) -> None:
    with os.fdopen(os.dup(nobody), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert submit(monkeypatch, "--dry-run", *FLAGS) == 128 + signal.SIGPIPE


def test_an_error_is_said_although_nobody_reads_the_output(nobody: int) -> None:
    command = [sys.executable, "-c", FAILING]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = partial(subprocess.run, cwd=ROOT, env=buffered, stderr=subprocess.PIPE, text=True, timeout=120)
    unread = run(command, stdout=nobody)
    assert (unread.stderr, unread.returncode) == ("error: sbatch refused\n", 2)
    closed = run(command, preexec_fn=lambda: os.close(1))
    assert (closed.stderr, closed.returncode) == ("error: sbatch refused\n", 2)


def test_an_interrupt_before_anything_was_started_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "check_inputs", interrupt)
    assert submit(monkeypatch, *FLAGS) == 130
    assert capsys.readouterr().err == "interrupted before anything was started\n"


def test_dry_run_prints_the_roles_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert submit(monkeypatch, "--dry-run", *FLAGS) == 0
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "router-0",
        "engine-0",
        "rollout-0",
        "trainer-0",
    ]
    assert out.splitlines()[-1].endswith(f"LOCAL_WORLD_SIZE=1 {sys.executable} -m rltrain.train")
    assert err.splitlines() == [
        "chosen because the trainer has no GPU: --no-bf16 --no-use-distributed-optimizer",
        "--actor-num-gpus-per-node is not given: one trainer rank here (slime takes 8)",
    ]
    assert list(tmp_path.iterdir()) == []


def test_dry_run_for_slurm_prints_the_script_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")  # not even Slurm is needed
    asked = ["--partition", "gpu", "--nodes", "3", "--name", "mine", "--num-gpus-per-node", "1"]
    assert submit(monkeypatch, "--dry-run", *asked, *FLAGS) == 0
    monkeypatch.undo()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "#!/bin/bash" and "#SBATCH --job-name=mine" in lines
    assert [line for line in lines if "nodes=" in line] == ["#SBATCH --nodes=1", "#SBATCH --nodes=2"]
    assert err.startswith("3 nodes: 1 for training (1 rank each), 2 for rollout (1 engine each)")
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_demo_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert submit(monkeypatch, "--dry-run") == 0
    assert "rltrain.sglang.engine" in capsys.readouterr().out
    assert submit(monkeypatch, "--dry-run", "--partition=gpu", "--nodes=2") == 0
    assert capsys.readouterr().out.count("#!/bin/bash") == 2
    assert submit(monkeypatch, "--dry-run", "--partition=gpu", "--nodes=2", "--colocate") == 0
    out, err = capsys.readouterr()
    assert out.count("--job-name=demo\n") == 1 and "each for training (1 rank each) and rollout" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("codes", "shown", "code"),
    [([0, 0], ["mine-sft", "mine"], 0), ([1], ["mine-sft"], 1), ([None], ["mine-sft"], 0)],
)
def test_both_jobs_of_the_demo_are_shown(
    codes: list[int | None], shown: list[str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first one was not, and the second waited for it without a word."""
    submitted, followed = [], []

    def submit_nothing(options: SubmitOptions, flags: object, check: object = None) -> int:
        submitted.append((options.name, options.detach, options.after))
        run_dir.append_submission(options.layout, {"job_id": options.name})
        return 0

    def follow_nothing(layout: RunLayout, job: str, steps: int) -> int | None:
        followed.append(job)
        assert layout.name == job and steps > 0
        return codes.pop(0)

    monkeypatch.setattr(demo, "submit_run", submit_nothing)
    monkeypatch.setattr(demo, "follow_job", follow_nothing)
    monkeypatch.setattr(subprocess, "run", lambda *args, **words: None)
    for name in ("mine-sft", "mine"):
        (tmp_path / name).mkdir()
    request = read_request(["--partition=gpu", "--nodes=2", "--name=mine", f"--runs-dir={tmp_path}"])
    assert demo.submit_demo(request.options, {}) == code
    assert submitted == [("mine-sft", True, ()), ("mine", True, ("mine-sft",))]
    assert (followed, codes) == (shown, [])


def test_partition_without_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(monkeypatch, "--partition", "gpu", *FLAGS) == 2
    assert "there is no sbatch on this machine's PATH" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert submit(monkeypatch, "--leraning-rate", "1", *FLAGS) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: unknown flag --leraning-rate")
    assert list(tmp_path.iterdir()) == []


def test_directory_that_is_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert submit(monkeypatch, "--name", "mine", *FLAGS) == 2
    assert "exists but is not a run" in capsys.readouterr().err


def parsed(*flags: str) -> tuple[run_dir.Flags, Config]:
    given = start_run.flag_data.split([*FLAGS, *flags])[1]
    return given, arguments.parse(start_run.flag_data.to_argv(given))


def test_run_directory_is_private_and_whole(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "runs" / "mine")
    flags, args = parsed("--colocate")
    run_dir.prepare(layout, args, flags)

    assert layout.root.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in layout.root.parent.iterdir()] == ["mine"]
    config = tomllib.loads(layout.config.read_text())
    # Paths are absolute: a resume from another directory means the same files.
    assert config["flags"]["prompt-data"] == config["train"]["prompt_data"] == str(tmp_path / "p.jsonl")
    assert config["flags"]["colocate"] is True
    assert run_dir.stored_flags(layout)["num-rollout"] == ["5"]
    assert arguments.load(layout.root).rollout.num_rollout == 5
    assert json.loads(layout.events.read_text())["kind"] == "run_submitted"


def test_run_directory_is_never_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(tmp_path / "runs" / "mine")
    flags, args = parsed()
    monkeypatch.setattr(run_dir, "append_event", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_dir.prepare(layout, args, flags)
    assert list(layout.root.parent.iterdir()) == []


def test_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    flags, args = parsed()
    with pytest.raises(UserError, match=r"can't make the run directory .*/file/mine: File exists: .*/file"):
        run_dir.prepare(RunLayout(tmp_path / "file" / "mine"), args, flags)


def test_finished_means_the_steps_that_are_asked_for_now(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "mine")
    flags, args = parsed()
    steps = args.rollout.num_rollout
    assert not is_finished(layout, steps)
    run_dir.prepare(layout, args, flags)
    assert not is_finished(layout, steps)
    layout.status.write_text('{"phase": "finished"}')
    assert not is_finished(layout, steps)  # nobody has proven it
    write_finish(layout, Finish(steps, attempt=0))
    assert is_finished(layout, steps) and not is_finished(layout, steps + 1)
    layout.status.write_text('{"phase": "failed"}')  # whatever came after it
    assert is_finished(layout, steps)


def test_help_and_dry_run_import_nothing_heavy() -> None:
    code = (
        "import sys; import hpc.submit, hpc.submitting.start_run; from hpc.submitting import command_line as request;"
        "request.full_parser().format_help(); request.read_request(['@demo']);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(imported) & HEAVY == set()
