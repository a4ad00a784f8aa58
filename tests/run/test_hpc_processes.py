"""Finding and ending processes; logs of events; one holder of a lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.run_files import lines_of

from hpc.runs.lock import hold_lock
from hpc.signals import SignalPipe
from rltrain.run import files, processes
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout


def test_parse_stat_with_a_name_full_of_parentheses() -> None:
    assert processes.parse_stat("42 (a) R (b) c)) S 7 42 42 0 -1") == (42, 7, "S")


def test_descendants_are_found_at_any_depth_and_killed() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        while len(found := processes.descendants(parent.pid)) < 1:
            assert parent.poll() is None
        assert processes.descendants(os.getpid()).count(parent.pid) == 1
        assert set(found) < set(processes.descendants(os.getpid()))
        assert processes.kill_descendants(parent.pid) == []
        assert parent.wait(timeout=60) == 0
        assert not Path(f"/proc/{found[0]}").exists()
    finally:
        parent.kill()
        parent.communicate()


V1 = "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "kills"),
    [
        ("0::/job/step\n", {"job/step/memory.events": "low 0\nhigh 7\noom 3\noom_kill 2\n"}, 2),
        ("0::/\n", {"memory.events": "oom 0\noom_kill 0\noom_group_kill 0\n"}, 0),  # a cgroup namespace
        (V1, {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"}, 5),
        (
            V1,
            {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},
            None,
        ),  # Linux before 4.13
        (V1, {"memory/other/memory.oom_control": "oom_kill 5\n"}, None),
        ("3:cpu:/job\n0::/job\n", {}, None),
    ],
)
def test_kills_for_memory_are_read_from_the_own_cgroup(
    tmp_path: Path, groups: str, files: dict[str, str], kills: int | None
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    assert processes.oom_kills(tmp_path / "cgroup", tmp_path / "mount") == kills
    assert processes.oom_kills(tmp_path / "none", tmp_path / "mount") is None


def test_child_dies_with_its_parent() -> None:
    code = (
        "import signal, subprocess; from rltrain.run.processes import dying_with_us\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=dying_with_us(signal.SIGTERM))\n"
        "print(child.pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert child in processes.descendants(parent.pid)
    pidfd = os.pidfd_open(child)
    parent.kill()
    parent.communicate()
    assert processes.wait_readable([pidfd], 60), "the child is still there"
    os.close(pidfd)


def test_signals_are_values_while_the_pipe_is_open() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with SignalPipe(signal.SIGUSR2, signal.SIGINT) as signals:
        assert signals.wait(0) == []
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.wait(5) == [signal.SIGUSR2, signal.SIGINT]
        subprocess.run(["true"], check=True)
        assert signals.wait(5) == []  # the child's end wakes it up and is not listed
    assert signal.getsignal(signal.SIGUSR2) is before


def test_event_after_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "whole"}\n{"kind": "ha')
    files.append_event(path, 1, "next", {"role": "x"})
    lines = path.read_text().splitlines()
    assert lines[1] == '{"kind": "ha'
    assert json.loads(lines[2])["kind"] == "next"
    assert len(lines) == 3


def test_events_from_many_threads_stay_whole(tmp_path: Path) -> None:
    log = files.EventLog(tmp_path / "events.jsonl", 0)

    def write(i: int) -> None:
        for j in range(50):
            log.append("tick", {"i": i, "j": j, "text": "é" * 200})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = lines_of(tmp_path / "events.jsonl")
    assert {(event["i"], event["j"]) for event in events} == {(i, j) for i in range(8) for j in range(50)}


def test_an_event_says_the_seconds_of_its_attempt_though_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = files.EventLog(tmp_path / "events.jsonl", 0)
    log.append("attempt_started", {})
    wrong = time.time() - 3600
    with monkeypatch.context() as fault:
        fault.setattr(files.time, "time", lambda: wrong)
        log.append("attempt_finished", {})
    begun, ended = files.read_lines(tmp_path / "events.jsonl")
    assert ended["time"] < begun["time"] and 0 <= begun["elapsed_s"] <= ended["elapsed_s"] < 600


def test_lock_has_one_holder_who_is_named(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    with hold_lock(layout), pytest.raises(UserError) as caught, hold_lock(layout):
        pass
    assert f"process {os.getpid()} on " in str(caught.value)
    with hold_lock(layout):  # free again
        pass
