"""Storms of faults: what is told apart from a finding, and who mends what Slurm itself gets wrong."""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpc.chaos import __main__ as chaos
from hpc.chaos import actions, verdict
from hpc.chaos import operator as operators
from hpc.chaos.actions import Weather
from hpc.chaos.faults import KINDS, Fault, NobodyError, draw
from hpc.chaos.operator import NoClusterError, Operator
from hpc.chaos.recovery import SeenLines
from hpc.chaos.storm import Outcome, Storm
from hpc.slurm.client import SlurmError, SlurmUnavailableError
from hpc.slurm.states import JobState
from hpc.submitting.executor import SlurmRefusalError
from rltrain.run.errors import UserError
from rltrain.run.files import append_event, append_line
from rltrain.run.layout import RunLayout

# Fakes of Slurm's programs: one that does not answer the first time, and one that refuses.
SILENT_FIRST = """\
#!/bin/sh
echo "$@" >> {directory}/asked
[ -e {directory}/seen ] && exit 0
touch {directory}/seen
echo "scancel: error: Kill job error on job id 9: Connection reset by peer" >&2
exit 1
"""
REFUSES = "#!/bin/sh\necho 'Job/step already completing or completed for job 9' >&2\nexit 1\n"


def fake(directory: Path, name: str, text: str) -> None:
    (directory / name).write_text(text.format(directory=directory))
    (directory / name).chmod(0o755)


def test_a_fault_is_done_as_soon_as_slurm_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was off stayed off when slurmctld did not take the word of it, and a job stayed suspended."""
    fake(tmp_path, "scancel", SILENT_FIRST)
    fake(tmp_path, "scontrol", REFUSES)
    calls: list[Any] = []
    cluster = SimpleNamespace(
        env={"PATH": f"{tmp_path}:/bin:/usr/bin"},
        power_off=lambda node, notice: calls.append((node, notice)),
        power_on=calls.append,
    )
    weather = Weather(cast(Any, cluster), RunLayout(tmp_path))
    assert weather.do(Fault("cancel", 1), "9") is None
    assert (tmp_path / "asked").read_text() == "9\n9\n"
    with pytest.raises(NobodyError, match="already completing"):
        weather.do(Fault("suspend", 1), "9")
    undo = weather.do(Fault("power-off", 1, "node2", seconds=1.0), "9")
    assert undo is not None and calls == [("node2", False)]
    undo()
    assert calls[1:] == ["node2"]
    (tmp_path / "seen").unlink()
    monkeypatch.setattr(actions, "_SILENCE_SECONDS", -1.0)
    with pytest.raises(NobodyError, match="Connection reset"):
        weather.do(Fault("cancel", 1), "9")


def test_a_fail_over_that_fails_is_undone(tmp_path: Path) -> None:
    undone: list[str] = []

    def fail_over() -> None:
        raise TimeoutError("the second slurmctld has not taken over")

    cluster = SimpleNamespace(fail_over=fail_over, restart_controller=lambda: undone.append("restarted"))
    with pytest.raises(TimeoutError):
        Weather(cast(Any, cluster), RunLayout(tmp_path)).do(Fault("fail-over", 1, seconds=1.0), "9")
    assert undone == ["restarted"]


def test_nodes_start_anew_on_which_slurm_can_not_end_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job was COMPLETING for 20 minutes. Nodes come back though slurmctld is silent, or one can't be ended."""
    done: list[str] = []
    stuck: set[str] = set()

    def power_off(node: str) -> None:
        if node in stuck:
            raise UserError("power_off: it does not end")
        done.append(f"{node} off")
        raise subprocess.CalledProcessError(1, "scontrol")  # of the word to slurmctld, which comes last

    cluster = SimpleNamespace(env={}, power_off=power_off, power_on=lambda node: done.append(f"{node} on"))
    operator = Operator(cast(Any, cluster), Path("/nowhere"))
    ending = [cast(Any, SimpleNamespace(state=JobState.COMPLETING, nodes=("node2", "node1")))]
    running = [cast(Any, SimpleNamespace(state=JobState.RUNNING, nodes=("node2", "node1")))]
    operator._end_what_does_not_end(ending, is_calm=True)
    monkeypatch.setattr(operators, "_QUEUE_SECONDS", -1.0)
    operator._end_what_does_not_end(running, is_calm=True)
    operator._end_what_does_not_end(ending, is_calm=False)
    operator._end_what_does_not_end(ending, is_calm=True)
    assert done == []
    operator._end_what_does_not_end(ending, is_calm=True)
    assert done == ["node1 off", "node2 off", "node1 on", "node2 on"]
    stuck.add("node2")
    operator._end_what_does_not_end(ending, is_calm=True)
    with pytest.raises(UserError, match="does not end"):
        operator._end_what_does_not_end(ending, is_calm=True)
    assert done[4:] == ["node1 off", "node1 on", "node2 on"]


def test_an_attempt_that_ended_before_it_could_say_so_is_no_finding(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    for attempt in (0, 1, 2):
        layout.log_dir(attempt).mkdir(parents=True)
    for attempt in (0, 2):
        append_event(layout.events, attempt, "attempt_started", {})
    assert verdict._of_attempts(layout) == []
    (layout.log_dir(1) / "srun-router-0.log").touch()  # it did start roles
    assert verdict._of_attempts(layout) == ["attempts have the numbers [0, 2]"]
    (layout.log_dir(1) / "srun-router-0.log").unlink()
    append_event(layout.events, 2, "attempt_started", {})
    assert verdict._of_attempts(layout) == ["attempts have the numbers [0, 2, 2]"]


def test_a_run_may_give_up_when_faults_leave_it_no_time_to_save(tmp_path: Path) -> None:
    cluster = SimpleNamespace(env={}, directory=tmp_path)
    storm = Storm(cast(Any, cluster), tmp_path, "run")
    storm.run_dir.mkdir()
    events = RunLayout(storm.run_dir).events
    append_event(events, 0, "checkpoint_saved", {})
    storm._events.look()
    now = time.time()
    few, many = ([(Fault("requeue", 1), now + 1)] * count for count in (2, 3))
    for attempt in range(1, 5):
        append_event(events, attempt, "attempt_started", {})
    assert not storm._is_worn_out(cast(Any, SimpleNamespace(done=many)))
    append_event(events, 5, "attempt_started", {})
    assert storm._is_worn_out(cast(Any, SimpleNamespace(done=many)))
    assert not storm._is_worn_out(cast(Any, SimpleNamespace(done=few)))  # then faults are not why
    assert not storm._is_worn_out(cast(Any, SimpleNamespace(done=[(fault, -math.inf) for fault, _ in many])))
    for step in range(10):  # an attempt that had the time, and did not
        append_line(RunLayout(storm.run_dir).metrics, {"step": step, "attempt": 3, "rollout/reward": 0.5})
    assert not storm._is_worn_out(cast(Any, SimpleNamespace(done=many)))
    append_event(events, 3, "checkpoint_failed", {"step": 5})
    assert storm._is_worn_out(cast(Any, SimpleNamespace(done=many)))


def test_faults_of_long_ago_excuse_no_run_that_gives_up(tmp_path: Path) -> None:
    """Where nothing was ever saved, all counted."""
    storm = Storm(cast(Any, SimpleNamespace(env={}, directory=tmp_path)), tmp_path, "run")
    storm.run_dir.mkdir()
    events = RunLayout(storm.run_dir).events
    append_event(events, 0, "attempt_started", {})
    storm._events.look()
    done = cast(Any, SimpleNamespace(done=[(Fault("requeue", 1), time.time())] * 3))
    for attempt in range(1, 6):
        append_event(events, attempt, "attempt_started", {})
    assert storm._is_worn_out(done)
    append_event(events, 6, "attempt_started", {})
    assert not storm._is_worn_out(done)


def test_two_threads_look_at_lines_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both could get the same lines, and miss others."""
    lines, both, met = SeenLines(tmp_path / "events.jsonl"), threading.Barrier(2), []

    def read() -> list[Any]:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(both.wait(0.2))
        return []

    monkeypatch.setattr(lines._lines, "read", read)
    threads = [threading.Thread(target=lines.look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []


PROBLEM = "metrics.jsonl lacks steps [7]"


@pytest.mark.parametrize(
    ("runs", "code", "says"),
    [
        ([None], 0, "storm 4: 1 of 1 faults"),
        ([PROBLEM, None], 0, "storm 4: not found again"),
        ([PROBLEM, PROBLEM], 1, "1 of 1 storms, 1 faults, 1 storms found something"),
        ([UserError("--lr: nonsense"), UserError("--lr: nonsense")], 1, "UserError: --lr: nonsense"),
        ([SlurmRefusalError("a bad script"), PROBLEM], 1, "SlurmRefusalError: a bad script"),
        ([SlurmUnavailableError("silent")], chaos.EXIT_BROKE_OFF, "storm 4 broke off: silent"),
        ([PROBLEM, NoClusterError("not up")], chaos.EXIT_BROKE_OFF, PROBLEM),
    ],
)
def test_a_finding_counts_that_is_found_again_and_slurms_silence_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: list[str | Exception | None],
    code: int,
    says: str,
) -> None:
    asked: list[tuple[str, str]] = []

    def run(storm: Storm, faults: tuple[Fault, ...], until: float) -> Outcome:
        """A fake of a storm."""
        asked.append((storm.run_dir.name, " ".join(map(str, faults))))
        found = runs[len(asked) - 1]
        if isinstance(found, Exception):
            raise found
        return Outcome(faults, len(faults), 0, 1.0, (), (found,) if found else ())

    monkeypatch.setattr(Storm, "run", run)
    monkeypatch.setattr(chaos, "wait_for_nodes", lambda cluster, seconds: None)
    words = ["--seed=4", "--repeat", "requeue@3", "--confirm", "--no-shrink"]
    args = chaos.Options(**vars(chaos._parser().parse_args(words)))
    assert chaos.weather(cast(Any, SimpleNamespace(env={}, directory=tmp_path)), tmp_path, args) == code
    said = capsys.readouterr().out
    assert says in said and ("again: python" in said) == (code == 1)
    assert asked == [("storm-4", "requeue@3"), ("storm-4-again", "requeue@3")][: len(runs)]


def test_a_slurm_that_does_not_come_up_is_told_from_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotUp:
        """A fake of a sandbox that does not come up."""

        def __init__(self, *args: object, **more: object) -> None:
            pass

        def up(self) -> None:
            raise UserError("the sandbox did not come up")

        def down(self) -> None:
            pass

    monkeypatch.setattr(chaos, "isolate", lambda words: None)
    monkeypatch.setattr(chaos, "Sandbox", NotUp)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert chaos.main([]) == chaos.EXIT_BROKE_OFF and chaos.EXIT_BROKE_OFF not in (0, 1, 2)
    assert "did not come up" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        chaos.main(["--storm=3"])
    assert ended.value.code == 2


def test_a_slurm_that_is_silent_at_the_end_hides_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*args: object) -> None:
        raise SlurmError("it does not answer")

    status = SimpleNamespace(returncode=1, stdout="", stderr="no such run")
    monkeypatch.setattr(verdict, "_last_job", silent)
    monkeypatch.setattr(verdict.subprocess, "run", lambda *args, **more: status)
    first, second = verdict._of_exit_codes(
        RunLayout(tmp_path), cast(Any, SimpleNamespace(env={})), cast(Any, None), False
    )
    assert "it does not answer" in first and "no such run" in second


def test_the_first_storms_of_ci_have_every_kind_of_fault() -> None:
    """And their seeds are fixed: a change finds what it finds."""
    words = (Path(__file__).parents[2] / ".ci/run").read_text().replace("\\\n", "")
    match = re.search(r"python -m hpc\.chaos ([^>]+)", words)
    assert match is not None
    args = chaos._parser().parse_args(shlex.split(match[1]))
    assert args.storms >= 6 and args.confirm and args.no_shrink and args.minutes and not args.real
    storms = [draw(args.seed + i, args.faults, args.steps) for i in range(6)]
    drawn = {fault.kind for faults in storms for fault in faults}
    assert drawn == {name for name, kind in KINDS.items() if kind.weight and not kind.is_real}


def test_ci_warns_of_a_slurm_that_is_gone_and_fails_of_all_else() -> None:
    words = (Path(__file__).parents[2] / ".ci/run").read_text()
    (case,) = re.findall(r"^ *case \$found in\n.*?^ *esac$", words, re.MULTILINE | re.DOTALL)
    endings = {}
    for code in (0, 1, 2, chaos.EXIT_BROKE_OFF, 124, 137):
        done = subprocess.run(["bash", "-ec", f"found={code}\n{case}"], capture_output=True, text=True)
        endings[code] = (done.returncode, done.stdout)
    assert [code for code, (ended, _) in endings.items() if ended == 0] == [0, chaos.EXIT_BROKE_OFF]
    assert "Slurm did not come up" in endings[chaos.EXIT_BROKE_OFF][1] and "minutes" in endings[124][1]
