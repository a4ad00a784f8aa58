"""The faults of a storm as values: drawn, written, read, and made fewer. tests/slurm/test_slurm_chaos.py has storms."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from helpers.local_job import wait_until
from hypothesis import given
from hypothesis import strategies as st

from hpc.chaos import __main__ as chaos
from hpc.chaos import clocks
from hpc.chaos.actions import Weather
from hpc.chaos.faults import KINDS, Fault, NobodyError, draw, parse
from hpc.chaos.isolated import thaw_left_disks
from hpc.chaos.operator import idle_nodes_with_used_gpus, stopped_processes
from hpc.chaos.recovery import SeenLines, recoveries, table
from hpc.chaos.roles import FIRST_VALUE, curve, next_value
from hpc.chaos.shrink import shrink
from hpc.chaos.soak import Growth, Reading, judge, read_disk, read_roles
from hpc.chaos.storm import Outcome
from hpc.planning.slurm_tables import SlurmTables
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.run.processes import parse_stat, wait_readable


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_a_seed_is_a_storm_that_can_be_written_and_read(seed: int, count: int) -> None:
    faults = draw(seed, count, steps=60)
    assert faults == draw(seed, count, steps=60) and len(faults) == count
    assert parse([str(fault) for fault in faults]) == faults
    assert all(1 <= fault.step < 60 for fault in faults)


def test_a_thousand_faults_are_of_every_kind_and_some_come_within_a_second() -> None:
    faults = draw(1, 1000, steps=60, real=True)
    assert {fault.kind for fault in faults} == {name for name, kind in KINDS.items() if kind.weight}
    others = draw(2, 1000, steps=60, real=True)
    assert faults != others
    assert not any(KINDS[fault.kind].is_real for fault in draw(1, 1000, steps=60))


def test_each_kind_can_be_done() -> None:
    assert all(hasattr(Weather, "_" + kind.replace("-", "_")) for kind in KINDS)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("kill", "not a fault like"),
        ("explode@3", "Kinds: kill"),
        ("kill@3", "kill takes router-0"),
        ("kill:node1@3", "kill takes router-0"),
        ("requeue:engine-0@3", "requeue takes no target"),
    ],
)
def test_a_word_that_says_no_fault_is_refused(word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse([word])


@given(st.sets(st.integers(0, 11), min_size=1, max_size=3))
def test_fewer_faults_that_still_do_it(guilty: set[int]) -> None:
    faults = [Fault("requeue", step) for step in range(12)]

    def fails(left: tuple[Fault, ...]) -> bool:
        return guilty <= {fault.step for fault in left}

    assert {fault.step for fault in shrink(faults, fails, tries=1000)} == guilty


def test_a_storm_that_does_not_fail_again_stays_as_it_is() -> None:
    faults = draw(1, 6, steps=60)
    assert shrink(faults, lambda left: False) == faults


class FakeStorm:
    """Fails where a torn line of metrics is followed by a requeue, as if such a line swallowed the next."""

    run_with: ClassVar[list[tuple[Fault, ...]]] = []

    def __init__(self, *args: object, **more: object) -> None:
        pass

    def run(self, faults: tuple[Fault, ...], until: float) -> Outcome:
        self.run_with.append(faults)
        problems = ("metrics.jsonl lacks steps [7]",) if self.fails(faults) else ()
        return Outcome(faults, len(faults), 0, 1.0, (), problems)

    @staticmethod
    def fails(faults: tuple[Fault, ...]) -> bool:
        kinds = [fault.kind for fault in faults]
        return "tear-metrics" in kinds and "requeue" in kinds[kinds.index("tear-metrics") :]


@pytest.mark.parametrize("minutes", [None, 0.5])
def test_a_storm_that_finds_something_ends_with_the_command_that_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], minutes: float | None
) -> None:
    """With as few faults as do it; with all where the time is over."""
    FakeStorm.run_with.clear()
    monkeypatch.setattr(chaos, "Storm", FakeStorm)
    monkeypatch.setattr(chaos, "wait_for_nodes", lambda cluster, seconds: None)
    seed = next(
        seed for seed in range(10, 1000, 2) if all(FakeStorm.fails(draw(seed + i, 40, 30)) for i in range(3))
    )
    args = chaos._parser().parse_args([f"--seed={seed}", "--storms=3", "--faults=40", "--steps=30"])
    args.minutes = minutes
    cluster: Any = None
    assert chaos.weather(cluster, tmp_path, args) == 1
    said = capsys.readouterr().out
    first = re.findall(r"again: python -m hpc.chaos --steps=30 --nodes=4 --repeat (.*)", said)[0]
    if minutes:
        assert parse(shlex.split(first)) == draw(seed, 40, 30) and len(FakeStorm.run_with) == 1
        assert "1 of 3 storms, 40 faults" in said
    else:
        assert [fault.kind for fault in parse(shlex.split(first))] == ["tear-metrics", "requeue"]
        assert "3 of 3 storms, 120 faults, 3 storms found something" in said


def test_the_curve_shows_a_step_that_is_lost_or_trained_twice() -> None:
    whole = curve(10)
    assert len(set(whole)) == 10
    lost = curve(9)
    assert lost == whole[:9] and next_value(FIRST_VALUE) / (2**31 - 1) == whole[0]


def test_the_recovery_from_a_fault_is_told_apart_from_what_no_run_can_do_without() -> None:
    rows = [{"time": time} for time in (13.0, 13.1, 13.2, 30.0, 30.1, 33.0)]
    events = [{"time": 10.0, "kind": "attempt_started"}, {"time": 15.0, "kind": "requeued"},
              {"time": 25.0, "kind": "attempt_started"}, {"time": 34.0, "kind": "attempt_finished"}]  # fmt: skip
    done = [(Fault("requeue", 2), 13.15), (Fault("freeze", 5, "trainer-0"), 30.5), (Fault("warn", 6), 40.0)]
    first, second = recoveries(done, rows, events)
    # It lasted from 13.2 to 30: ten seconds in the queue, three of a start. Nothing came after the last fault.
    assert (first.fault.kind, first.seconds, first.least) == (
        "requeue",
        pytest.approx(16.8),
        pytest.approx(13.0),
    )
    assert (second.seconds, second.least) == (pytest.approx(2.5), 0.0)
    assert [line.split()[:2] for line in table([first, second])[1:]] == [["freeze", "1"], ["requeue", "1"]]


def test_lines_have_the_time_at_which_they_were_seen(tmp_path: Path) -> None:
    lines = SeenLines(tmp_path / "metrics.jsonl")
    assert lines.look() == []
    before = time.time()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 5.0}\n{"step": 1, "ti')
    (first,) = lines.look()
    assert first["step"] == 0 and before <= first["time"] <= time.time()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('me": 6.0}\n')
    assert lines.look()[0] == first and [line["step"] for line in lines.look()] == [0, 1]


def test_a_clock_jumps_and_sleeping_does_not(tmp_path: Path) -> None:
    if not (env := clocks.variables(tmp_path)):
        pytest.skip("no gcc")
    env = {**env, "SLURMLIME_CHAOS_CLOCK": str(tmp_path / "clock")}
    program = """
import os, sys, time
from datetime import datetime
from pathlib import Path
clock, begun, steady = Path(sys.argv[1]), time.time(), time.monotonic()
for wrong in ("3600", "-3600", ""):
    clock.write_text(wrong)
    time.sleep(0.01)
    print(round((time.time() - begun) / 3600), round((datetime.now().timestamp() - begun) / 3600))
print(time.monotonic() - steady < 1800, "LD_PRELOAD" in os.environ)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "clock")]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    # The supervisor starts srun, which must have the right time.
    assert done.stdout.split() == ["1", "1", "-1", "-1", "0", "0", "True", "False"], done.stderr
    tables = clocks.that_can_jump(SlurmTables(env={"A": "b"}), tmp_path)
    assert tables.python is not None and tables.env["A"] == "b"
    role = {"SLURMLIME_ROLE": "engine", "SLURMLIME_CHAOS_CLOCK": env["SLURMLIME_CHAOS_CLOCK"]}
    command[0] = tables.python
    done = subprocess.run(command, env={**os.environ, **role}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "1", "-1", "-1", "0", "0", "True", "True"], done.stderr
    others = [(1, {"SLURMD_NODENAME": "node1"}), (1, env)]
    with pytest.raises(NobodyError, match="node1"):
        clocks.jump("node1", others, hours=1)


STALLED = """
import json, os, subprocess, sys, tempfile
from pathlib import Path
from hpc.chaos.isolated import PREFIX, Stops, disk_for_runs, is_isolated, isolate

WRITE = "import os, sys; f = open(sys.argv[1], 'w'); f.write('x'); f.flush(); os.fsync(f.fileno()); print('written')"
isolate(sys.argv)
with tempfile.TemporaryDirectory(prefix=PREFIX) as name, disk_for_runs(Path(name)) as runs:
    if not is_isolated():
        sys.exit("no namespaces")
    runs.mkdir()
    stops = Stops(runs, seconds=600.0)
    writer = subprocess.Popen([sys.executable, "-c", WRITE, runs / "file"])
    print(json.dumps([name, stops._process.pid, writer.pid]), flush=True)
    sys.stdin.read()
"""


def state_of(pid: int) -> str:
    """A letter of proc(5); X for a process that is not there."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())[2]
    except OSError:
        return "X"


@pytest.mark.parametrize("alone", [True, False])
def test_a_disk_that_was_stopped_goes_on_when_its_storm_is_killed(tmp_path: Path, alone: bool) -> None:
    """At once; or, if what was to see to that is killed too, when the next storm begins."""
    (tmp_path / "stalled.py").write_text(STALLED)
    with subprocess.Popen([sys.executable, tmp_path / "stalled.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as storm:  # fmt: skip
        assert storm.stdin is not None and storm.stdout is not None
        if not (said := storm.stdout.readline()):
            pytest.skip("namespaces and disks of one's own take root")
        directory, stopper, writer = json.loads(said)
        try:
            wait_until(lambda: state_of(writer) == "D")  # it waits for the disk
            if not alone:
                os.kill(stopper, signal.SIGKILL)
            storm.kill()
            if not alone:
                wait_until(lambda: state_of(stopper) in "ZX")
                thaw_left_disks()
            assert wait_readable([storm.stdout], 60.0) and storm.stdout.readline() == "written\n"
        finally:
            thaw_left_disks()
            shutil.rmtree(directory)


FAKE_ROLE = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()", *sys.argv[1:]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
"""


@pytest.mark.parametrize(
    ("role", "child", "fault"),
    [
        ("engine", "sglang::scheduler", Fault("stall-engine", 1, "engine-0")),
        ("rollout", "rltrain.rewards.worker", Fault("hang-reward", 1)),
    ],
)
def test_what_a_role_has_started_stands_still_for_a_while(
    tmp_path: Path, role: str, child: str, fault: Fault
) -> None:
    (tmp_path / "fake_role.py").write_text(FAKE_ROLE)
    own = {"SLURMLIME_RUN_DIR": str(tmp_path), "SLURMLIME_ROLE": role, "SLURMLIME_INDEX": "0"}
    env = {**os.environ, **own, "PYTHONPATH": str(tmp_path)}
    weather = Weather(cast(Any, None), RunLayout(tmp_path))
    with pytest.raises(NobodyError, match=f"no {role}-0"):
        weather.do(fault, "7")
    command = [sys.executable, "-m", "fake_role", child]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        undo = weather.do(fault, "7")
        assert undo is not None
        while state(pid) != "T":  # a signal takes a moment
            assert process.poll() is None
        assert state(process.pid) != "T"
        undo()
        while state(pid) == "T":
            assert process.poll() is None
        os.kill(pid, signal.SIGKILL)


def state(pid: int) -> str:
    return parse_stat(Path(f"/proc/{pid}/stat").read_text())[2]


def test_gpus_that_slurm_takes_for_used_on_idle_nodes() -> None:
    listed = ["node1 idle gpu:h100:1(IDX:0)", "node2 planned gpu:h100:0(IDX:N/A)", "node3 allocated gpu:a100:1(IDX:0)",
              "node4 idle gpu:0", "cpu1 planned gpu:a100:2(IDX:0-1)"]  # fmt: skip
    assert idle_nodes_with_used_gpus("\n".join(listed)) == {"node1", "cpu1"}


def test_a_stopped_process_is_found_by_a_word_of_its_command(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()", str(tmp_path)]) as process:
        try:
            assert stopped_processes(str(tmp_path)) == []
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert stopped_processes(str(tmp_path)) == [process.pid]
        finally:
            process.kill()


def test_a_long_run_says_what_grows(tmp_path: Path) -> None:
    growth = Growth()
    for second in range(40):
        growth.roles["engine-0"].append(Reading(50 * second, memory=10 << 20, files=20, threads=4 + second))
        growth.roles["trainer-0"].append(
            Reading(50 * second, (10 + 2 * second) << 20, files=second, threads=4)
        )
        disk = {
            "metrics.jsonl": (5000 * second, 1),
            "traces": (0, 50 * second),
            "rollouts": (9**9 * second, 1),
        }
        growth.disk.append((50 * second, disk))
    lines, problems = judge(growth, files_per_step=0.0, bytes_per_step=99.0)
    assert [problem.split(" at step")[0] for problem in problems] == [
        "engine-0 has 20 more threads",
        f"trainer-0 has {40 << 20} more memory",
        "trainer-0 has 20 more files",
        "the run directory got 1450 files in 1450 steps",
        "the run directory got 100 bytes a step, most of them in metrics.jsonl",
    ]
    assert "  ".join(lines).count("metrics.jsonl") == 1
    assert judge(growth, files_per_step=1.0, bytes_per_step=101.0)[1] == problems[:3]


def test_a_role_and_what_it_started_are_read_together(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    )
    env = {
        **os.environ,
        "SLURMLIME_RUN_DIR": str(tmp_path),
        "SLURMLIME_ROLE": "engine",
        "SLURMLIME_INDEX": "3",
    }
    command = [sys.executable, "-c", program]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a").write_text("12345")
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        child = int(process.stdout.readline())
        try:
            readings = read_roles(tmp_path, step=7)
        finally:
            os.kill(child, 9)
            process.stdin.close()
    assert list(readings) == ["engine-3"]
    reading = readings["engine-3"]
    assert reading.step == 7 and reading.threads == 2 and reading.memory > 1 << 20 and reading.files >= 6
    assert read_disk(tmp_path) == {"logs": (5, 1)}
