"""What is shown of a run: the feed, plain lines, the panel, the summary."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from rich.console import Console

from hpc import cli
from hpc.runs import live_view, summary
from hpc.runs.progress import RunFeed, RunState
from hpc.submitting.start_run import _unless_unseen
from rltrain.run.files import GrowingLines
from rltrain.run.layout import RunLayout


def step(number: int, **metrics: float) -> dict:
    return {"step": number, "perf/step_s": 2.0, **metrics}


def test_lines_are_given_once_and_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = GrowingLines(path)
    assert lines.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert lines.read() == [{"a": 1}, {"a": 2}]
    assert lines.read() == []
    with path.open("a") as file:
        file.write(': 3}\nbroken\n[1]\n{"a": 4}\n')
    assert lines.read() == [{"a": 3}, {"a": 4}]


def test_a_disk_that_fails_for_a_moment_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path)
    feed = RunFeed(layout)

    def fails(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "injected fault")

    layout.metrics.write_text(json.dumps(step(0)) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        patch.setattr(Path, "read_bytes", fails)
        assert feed.poll() == ([], [])
    assert feed.poll() == ([step(0)], [])


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_only_the_stream_that_nobody_reads_is_silenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    (good,) = {"stdout", "stderr"} - {broken}
    with os.fdopen(writer, "w") as closed, (tmp_path / "file").open("w") as kept:
        monkeypatch.setattr(sys, broken, closed)
        monkeypatch.setattr(sys, good, kept)
        for number in range(2):
            _unless_unseen(lambda: print("unseen", file=getattr(sys, broken), flush=True))
            print(number, file=getattr(sys, good), flush=True)
        assert str(Path(f"/proc/self/fd/{writer}").readlink()) == os.devnull
        monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "0\n1\n"


def test_state_keeps_the_last_try_of_a_step_and_the_newest_roles() -> None:
    state = RunState()
    for record in [step(-1, **{"eval/t": 0.2}), step(0, x=1), step(1, x=2), step(1, x=3, **{"eval/t": 0.5})]:
        state.add_metrics(record)
    assert [record["x"] for record in state.steps] == [1, 3]
    assert state.series("eval/t") == [0.2, 0.5]
    assert state.eval_names == ["eval/t"]
    assert state.seconds_left(10) == pytest.approx(8 * 2.0)

    for kind, role in [("role_started", "engine"), ("role_ready", "engine"), ("role_started", "trainer")]:
        state.add_event({"kind": kind, "role": role, "index": 0})
    assert state.roles == {"engine-0": "ready", "trainer-0": "starting"}
    state.add_event({"kind": "role_started", "role": "trainer", "index": 1})
    state.add_event({"kind": "role_ready", "role": "trainer", "index": 0})
    state.add_event({"kind": "role_died", "role": "engine", "index": 0})
    assert state.roles == {"engine-0": "died", "trainer-0": "ready", "trainer-1": "ready"}
    state.add_event({"kind": "attempt_finished"})
    assert state.roles == {"engine-0": "died", "trainer-0": "ended", "trainer-1": "ended"}
    state.add_event({"kind": "attempt_started"})
    assert state.roles == {}


def test_nested_eval_metrics_are_no_evaluations_of_their_own() -> None:
    state = RunState()
    state.add_metrics(step(0, **{"eval/t": 0.5, "eval/t/response_length": 9.0}))
    assert state.eval_names == ["eval/t"]


def test_step_lines() -> None:
    state = RunState()
    record = step(2, **{"rollout/reward": 0.25, "eval/t": 0.5, "perf/tokens_per_s": 1234.4})
    state.add_metrics(record)
    assert live_view.describe_step(record, 10, state).split("  ") == [
        "step 3/10", "reward 0.250", "eval/t 0.500", "1234 tokens/s", "2.0 s", "0:14 left",
    ]  # fmt: skip
    assert live_view.describe_step({"step": -1, "eval/t": 0.5}, 10, state) == "before training  eval/t 0.500"


def test_the_loss_is_shown_only_where_there_is_no_reward() -> None:
    grpo = step(0, **{"rollout/reward": 0.25, "train/loss": 1e-9})
    assert "loss" not in live_view.describe_step(grpo, 10, RunState())
    assert "loss 2.3456" in live_view.describe_step(step(0, **{"train/loss": 2.34561}), 10, RunState())
    for record, label in [(grpo, "reward"), (step(0, **{"train/loss": 2.34561}), "loss")]:
        state = RunState()
        state.add_metrics(record)
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(live_view.panel("job", state, 4, elapsed=0))
        text = console.export_text()
        assert ("reward" in text, "loss" in text) == (label == "reward", label == "loss")


def test_checkpoints_that_fail_are_seen(tmp_path: Path) -> None:
    state = RunState(status={"phase": "generating"})
    for kind, number in [("checkpoint_saved", 1), ("checkpoint_failed", 2)]:
        event = {"kind": kind, "step": number, "reason": "the disk is full: it takes 2.0 GiB"}
        state.add_event(event)
    assert "NOT saved after step 2: the disk is full" in (live_view.describe_event(event) or "")
    console = Console(width=100, record=True)
    console.print(live_view.panel("x", state, 4, 1.0))
    assert "not saved: the disk is full" in console.export_text()
    rows = dict(summary.summary_rows(RunLayout(tmp_path), state, 4, 1.0))
    assert rows["checkpoint"].endswith("it takes 2.0 GiB (the last one is of step 1)")
    state.add_event({"kind": "checkpoint_saved", "step": 3})
    assert state.unsaved is None


def test_panel_shows_phase_progress_and_roles() -> None:
    state = RunState(status={"phase": "generating", "attempt": 1}, roles={"engine-0": "ready"})
    for i in range(3):
        state.add_metrics(step(i, **{"rollout/reward": i / 2, "perf/tokens_per_s": 10.0}))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(live_view.panel("job", state, 4, elapsed=3725))
    text = console.export_text()
    for expected in (
        "generating  (attempt 1)",
        "3/4",
        "1:02:05, about 0:02 left",
        "1.000  ▁▅█",
        "engine-0 ready",
    ):
        assert expected in text


def test_panel_of_a_run_that_has_just_begun() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(live_view.panel("job", RunState(), 4, elapsed=0))
    assert "0/4" in console.export_text()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00")])
def test_clock(seconds: float, text: str) -> None:
    assert live_view.clock(seconds) == text


def test_summary_tells_first_and_last(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "job")
    layout.log_dir(0).mkdir(parents=True)
    records = [
        step(-1, **{"eval/t": 0.3}),
        step(0, **{"rollout/reward": 0.1}),
        step(1, **{"rollout/reward": 0.9}),
    ]
    layout.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    layout.status.write_text('{"phase": "stopped"}')
    feed = RunFeed(layout)
    feed.poll()
    rows = dict(summary.summary_rows(layout, feed.state, 5, 61))
    assert rows["state"] == "stopped, 1 attempt(s)"
    assert rows["steps"] == "2 of 5"
    assert rows["reward"] == "0.100 → 0.900"
    assert rows["eval/t"] == "0.300 → 0.300"


@pytest.mark.parametrize("folder", ["runs", "my $runs `x` it's"])
def test_next_commands_survive_the_shell(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cli, summary):
        monkeypatch.setattr(module, "python_command", lambda: "python")
    layout = RunLayout(tmp_path / folder / "job")
    commands = dict(summary.next_commands(layout, finished=False, num_rollout=3))
    assert shlex.split(commands["resume"]) == [
        "python", "-m", "hpc.resubmit", "job", "--runs-dir", str(layout.root.parent),
    ]  # fmt: skip
    more = shlex.split(dict(summary.next_commands(layout, finished=True, num_rollout=3))["train on"])
    assert more[2:6] == ["hpc.resubmit", "job", "--num-rollout", "6"]
    assert shlex.split(commands["samples"]) == [
        "python",
        "-m",
        "analysis.sample",
        str(layout.root),
        "--worst",
    ]
    assert summary.NOTEBOOK.is_file()
    words = subprocess.run(
        ["bash", "-c", f'python() {{ printf "%s\\0" "$@"; }}; {commands["pandas"]}'],
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    assert words[0] == "-c"
    code = words[1].replace("from analysis import load_run", "load_run = print")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == str(layout.root)


def test_commands_name_the_python_that_has_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Path(sys.executable).absolute().parent
    monkeypatch.setenv("PATH", f"{ours}:/usr/bin")
    assert cli.python_command() == "python"
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(ours.parent)
    assert cli.python_command() == f"{ours.name}/python"
    monkeypatch.chdir("/")
    assert Path("/", cli.python_command()).samefile(sys.executable)
