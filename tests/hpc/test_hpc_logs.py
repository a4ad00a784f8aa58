"""Logs of a run: which, how many lines, following, and text that would steer a terminal."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.local_job import PATIENCE, Job, wait_until
from helpers.run_files import make_run

from hpc import logs
from hpc.cli import run_main
from hpc.runs.lock import hold_lock
from hpc.runs.log_files import LogFile
from rltrain.run.errors import UserError
from rltrain.run.files import append_event
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import safe_line


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    """Two attempts; the second has two engines, a trainer and a supervisor."""
    layout = make_run(tmp_path, "x", phase="stopped", attempts=2)
    (layout.log_dir(0) / "trainer-0.log").write_text("old\n")
    for name in ("engine-0", "engine-1", "trainer-0", "supervisor"):
        (layout.log_dir(1) / f"{name}.log").write_text("".join(f"{name} {i}\n" for i in range(100)))
    return layout


def texts(lines: list[logs.LogLine]) -> list[str]:
    return [line.text for line in lines]


def test_last_lines_of_all_roles_who_says_most_at_the_end(layout: RunLayout) -> None:
    lines = logs.last_lines(layout.root)
    assert [name for name, _ in itertools.groupby(line.name for line in lines)] == [
        *("engine-0", "engine-1", "trainer-0", "supervisor"),
    ]
    assert len(lines) == 40 and {line.attempt for line in lines} == {1}
    assert texts(lines)[-1] == "supervisor 99"


def test_what_slurm_says_of_a_step_comes_first(layout: RunLayout) -> None:
    (layout.log_dir(1) / "srun-trainer-[0-1].log").write_text("srun: error: Unable to create step\n")
    (layout.log_dir(1) / "srun-engine-0.log").touch()
    first, second = logs.last_lines(layout.root)[:2]
    assert (first.name, first.text) == ("srun-trainer-[0-1]", "srun: error: Unable to create step")
    assert second.name == "engine-0"
    append_event(
        layout.events, 1, "attempt_finished", {"state": "stopped"}
    )  # as it should be: that says nothing
    assert logs.last_lines(layout.root)[0].name == "engine-0"
    assert logs.last_lines(layout.root, role="srun")


def test_the_cause_of_a_failure_comes_first(layout: RunLayout) -> None:
    (layout.log_dir(1) / "srun-engine-0.log").write_text("srun: error: node1: task 0: Killed\n")
    failure = "trainer-0 exited with code 1: ValueError: no reward"
    told = f"{failure}. Its log, {layout.log_dir(1)}/trainer-0.log, ends:\n  | trainer-0 99"
    append_event(layout.events, 0, "attempt_finished", {"state": "failed", "reason": "an older one"})
    append_event(layout.events, 1, "attempt_finished", {"state": "failed", "reason": told})
    assert logs.last_lines(layout.root)[0] == logs.LogLine(1, "cause", failure)
    assert next(logs.follow(layout.root)) == logs.LogLine(1, "cause", failure)
    assert texts(logs.last_lines(layout.root, attempt=0)) == ["an older one", "old"]
    assert logs.last_lines(layout.root, role="trainer", n=1)[0].text == "trainer-0 99"  # it was asked for


def test_a_single_log_is_shown_longer(layout: RunLayout) -> None:
    lines = logs.last_lines(layout.root, role="engine", index=1)
    assert texts(lines) == [f"engine-1 {i}" for i in range(50, 100)]
    assert texts(logs.last_lines(layout.root, role="trainer", n=2)) == ["trainer-0 98", "trainer-0 99"]
    assert texts(logs.last_lines(layout.root, role="trainer", n=0)) == []
    assert texts(logs.last_lines(layout.root, attempt=0)) == ["old"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"attempt": 7}, "no attempt 7: there are attempts 0, 1; attempts count from 0"),
        ({"role": "router"}, "no log of router; it has: engine-0, engine-1"),
        ({"role": "engine", "index": 2}, "no log of engine 2"),
    ],
)
def test_what_is_not_there_is_named(layout: RunLayout, chosen: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        logs.last_lines(layout.root, **chosen)


def test_before_the_first_attempt(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x")
    with pytest.raises(UserError, match="no attempt has begun"):
        logs.last_lines(layout.root)
    layout.submitit.mkdir()
    (layout.submitit / "28.log").write_text("slurmstepd: error: no such container\n")
    assert texts(logs.last_lines(layout.root)) == ["slurmstepd: error: no such container"]


@pytest.mark.parametrize("count", [1, 3, 4000, 10**6])
def test_tail_of_a_large_file(tmp_path: Path, count: int) -> None:
    lines = [f"{i} " + "x" * (i % 200) for i in range(5000)]
    path = tmp_path / "engine-0.log"
    path.write_text("\n".join(lines) + "\nunfinished")
    file = LogFile(path, 0, "engine", 0)
    assert file.tail(count) == lines[-count:]
    assert file.read_new() == []
    with path.open("a") as out:
        out.write(" line\nnext\n\nrest")
    assert file.read_new() == ["unfinished line", "next", ""]
    assert file.read_rest() == ["rest"]


def test_follow_goes_on_over_attempts_and_ends_with_the_run(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="training", attempts=1)
    log = layout.log_dir(0) / "trainer-0.log"
    log.write_text("".join(f"{i}\n" for i in range(100)))
    with contextlib.ExitStack() as running:
        running.enter_context(hold_lock(layout))
        lines = logs.follow(layout.root, n=2)
        assert texts([next(lines), next(lines)]) == ["98", "99"]
        with log.open("a") as out:
            out.write("100\nhalf")
        assert next(lines).text == "100"
        layout.log_dir(1).mkdir()
        (layout.log_dir(1) / "trainer-0.log").write_text("again\n")
        with log.open("a") as out:
            out.write(" a line\n")
        assert [next(lines), next(lines)] == [
            logs.LogLine(0, "trainer-0", "half a line"),
            logs.LogLine(1, "trainer-0", "again"),
        ]
        layout.status.write_text('{"phase": "finished"}')
        with (layout.log_dir(1) / "trainer-0.log").open("a") as out:
            out.write("bye")  # its last line has no end
    assert texts(list(lines)) == ["bye"]


def test_follow_of_a_run_that_has_ended(layout: RunLayout) -> None:
    assert len(list(logs.follow(layout.root))) == 40
    assert texts(list(logs.follow(layout.root, attempt=0))) == ["old"]


@pytest.mark.slow
def test_follow_a_running_job(job: Job) -> None:
    process = job.start(steps=1000, engine=["serve", "leak"], trainer=["train"])
    wait_until(lambda: job.steps())
    command = [sys.executable, "-m", "hpc.logs", "job", "-f", "--role", "supervisor"]
    with subprocess.Popen(command, cwd=job.directory, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        assert "started router-0" in follower.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        rest = follower.stdout.read()
        assert follower.wait(timeout=PATIENCE) == 0
    assert "got SIGINT" in rest and "trainer-0 ended with 75" in rest
    assert all(line.startswith("[supervisor] ") for line in rest.splitlines())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext é 漢", "plain\ttext é 漢"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("10%\r50%\rdone", "done"),
        ("dos line\r", "dos line"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b31m", r"\x9b31m"),
    ],
)
def test_terminal_is_not_steered(text: str, shown: str) -> None:
    assert safe_line(text) == shown


def test_raw_to_a_file_harmless_on_a_terminal(layout: RunLayout) -> None:
    (layout.log_dir(1) / "engine-0.log").write_text("\x1b]0;owned\x07\n")
    command = [sys.executable, "-m", "hpc.logs", str(layout.root), "--role=engine", "--index=0"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.stdout == b"\x1b]0;owned\x07\n"
    ours, theirs = pty.openpty()
    subprocess.run(command, stdout=theirs, check=True, timeout=120)
    os.close(theirs)
    assert os.read(ours, 4096).strip() == rb"\x1b]0;owned\x07"
    os.close(ours)


def test_command_line_errors(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["logs", str(layout.root), "-n", "-1"])
    assert run_main(logs.main) == 2 and "negative" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["logs", str(layout.root), "--role=trianer"])
    with pytest.raises(SystemExit, match="2"):
        run_main(logs.main)
    assert "invalid choice" in capsys.readouterr().err


def test_head_closes_the_pipe_without_a_traceback(layout: RunLayout) -> None:
    (layout.log_dir(1) / "trainer-0.log").write_text("x" * 100 + "\n" + "y\n" * 200_000)
    command = f"{sys.executable} -m hpc.logs {layout.root} --role trainer -n 200001 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[trainer-0] " + "x" * 100 + "\n", "")
