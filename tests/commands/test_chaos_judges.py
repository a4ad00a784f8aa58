"""Storms of faults: what is told apart from a finding, and who mends what Slurm itself gets wrong."""

from __future__ import annotations

import math
import re
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
from hpc.chaos.operator import Operator
from hpc.chaos.storm import Storm
from hpc.slurm.states import JobState
from rltrain.run.files import append_event
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
    """A job was COMPLETING for 20 minutes."""
    done: list[str] = []
    cluster = SimpleNamespace(
        env={},
        power_off=lambda node: done.append(f"{node} off"),
        power_on=lambda node: done.append(f"{node} on"),
    )
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


def test_the_first_storms_of_ci_have_every_kind_of_fault() -> None:
    """And their seeds are fixed: a change finds what it finds."""
    words = (Path(__file__).parents[2] / ".ci/run").read_text()
    match = re.search(r"python -m hpc\.chaos --seed (\d+) --storms (\d+) ", words)
    assert match is not None and int(match[2]) >= 6
    args = chaos._parser().parse_args([])
    storms = [draw(int(match[1]) + i, args.faults, args.steps) for i in range(6)]
    drawn = {fault.kind for faults in storms for fault in faults}
    assert drawn == {name for name, kind in KINDS.items() if kind.weight and not kind.is_real}
