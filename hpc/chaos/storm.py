"""One storm: submit a run, do the faults at their steps, resubmit it where a person would, and judge it at its end."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.chaos import verdict
from hpc.chaos.actions import NobodyError, Undo, Weather
from hpc.chaos.faults import KINDS, Fault
from hpc.planning.job_plan import JobPlan
from hpc.planning.request import SubmitOptions, read_request
from hpc.resubmit import merge_options
from hpc.runs.find import read_submissions
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient, SlurmError, status_of
from hpc.slurm.states import JobState
from hpc.submitting import run_dir
from hpc.submitting.slurm_job import plan_job, submit_job
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError
from rltrain.run.files import read_lines
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows

ROLES = "hpc.chaos.roles"
FLAGS = (
    *("--partition=gpu", "--nodes=4", "--num-gpus-per-node=1", "--time=1:00:00", "--max-failures=3"),
    *(
        "--hf-checkpoint=/nowhere",
        "--prompt-data=/nowhere",
        "--rollout-batch-size=1",
        "--n-samples-per-prompt=2",
    ),
    *("--global-batch-size=2", "--save-interval=5", "--wandb-mode=disabled"),
)
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 2.0
_MAX_HANDS = 20
_GAP_SECONDS = 2.0  # without a step; a step takes a tenth of a second


@dataclass(frozen=True)
class Outcome:
    """What became of a storm.

    Attributes:
        faults: that were drawn.
        done: how many of them met somebody.
        hands: how often the run had to be resubmitted.
        seconds: from submission to the end.
        recoveries: seconds of each time in which no step was logged.
        problems: what is not as it must be, in words; empty if all is.
    """

    faults: tuple[Fault, ...]
    done: int
    hands: int
    seconds: float
    recoveries: tuple[float, ...]
    problems: tuple[str, ...]


class Storm:
    """A storm over a run of stand-ins on a sandbox.

    Args:
        cluster: that is up.
        runs_dir: where the run is made.
        name: of the run.
        steps: that it trains.
        timeout: seconds after which it counts as stuck.
    """

    def __init__(
        self, cluster: Sandbox, runs_dir: Path, name: str, steps: int = 60, timeout: float = 600.0
    ) -> None:
        self._cluster, self._steps, self._timeout = cluster, steps, timeout
        self._layout = RunLayout(runs_dir.resolve() / name)
        self._client = SlurmClient(cluster.env)
        self._weather = Weather(cluster, self._layout)
        self._looked = 0.0

    def run(self, faults: Sequence[Fault]) -> Outcome:
        """Run it to its end, and judge it."""
        faults = tuple(faults)
        begun = time.monotonic()
        with slurm_of(self._cluster):
            self._submit()
            script = _Script(faults, self._weather)
            hands, stuck = self._weather_it(script, begun + self._timeout)
            script.end_all()
            problems = [*stuck, *verdict.judge(self._layout, self._steps, self._cluster)]
        allowed = sum(KINDS[fault.kind].needs_a_hand for fault in faults)
        if hands > allowed:
            problems.append(
                f"{hands} times the run ended and had to be resubmitted; {allowed} faults end one"
            )
        seconds = time.monotonic() - begun
        return Outcome(faults, script.done, hands, seconds, _gaps(self._layout), tuple(problems))

    def _weather_it(self, script: _Script, deadline: float) -> tuple[int, list[str]]:
        hands = 0
        # Slurm may take minutes to clean up where a node was lost; a finished run is over.
        while not is_finished(self._layout, self._steps) or self._is_alive(but_completing=True):
            if time.monotonic() > deadline:
                return hands, [f"not finished after {self._timeout:.0f} s: {self._state()}"]
            script.go_on(self._trained(), self._job())
            self._mend_nodes()
            if not self._is_alive() and not is_finished(self._layout, self._steps):
                if hands == _MAX_HANDS:
                    return hands, [f"not finished after {hands} times of resubmitting"]
                hands += self._resubmit()
            time.sleep(_POLL_SECONDS)
        return hands, []

    def _mend_nodes(self) -> None:
        """What an operator does: Slurm drains a node where it could not end a step, as its slurmstepd was dead."""
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            for node in self._client.node_states():
                if node.state.startswith("drain") and node.reason == "Kill task failed":
                    self._cluster.run("scontrol", "update", f"nodename={node.name}", "state=resume")
        except (SlurmError, subprocess.CalledProcessError):  # it does not answer for now
            pass

    def _submit(self) -> None:
        words = [*FLAGS, f"--name={self._layout.name}", f"--runs-dir={self._layout.root.parent}"]
        request = read_request([*words, f"--num-rollout={self._steps}"])
        self._send(request.options, request.train)

    def _resubmit(self) -> int:
        """What a person does: `python -m hpc.resubmit`, and again when Slurm does not answer."""
        options, _ = merge_options(self._layout, [])
        try:
            self._send(options, run_dir.stored_flags(self._layout))
        except (SlurmError, UserError) as error:
            print(f"resubmit: {error}", flush=True)
            time.sleep(1.0)
            return 0
        return 1

    def _send(self, options: SubmitOptions, flags: Flags) -> None:
        job = plan_job(options, flags, check=lambda config: config)
        submit_job(replace(job, plan=with_stand_ins(job.plan)))

    def _trained(self) -> int:
        rows = newest_rows(read_lines(self._layout.metrics))
        return max(rows, default=-1) + 1

    def _job(self) -> str:
        return read_submissions(self._layout)[-1].job_id

    def _is_alive(self, *, but_completing: bool = False) -> bool:
        """Whether the job waits or runs; a job that Slurm cleans up after counts, unless `but_completing`."""
        try:
            state = status_of(self._job(), self._client.squeue([self._job()])).state
        except SlurmError:  # it does not answer for now
            return True
        return not state.is_final and not (but_completing and state is JobState.COMPLETING)

    def _state(self) -> str:
        try:
            return f"job {self._job()} is {status_of(self._job(), self._client.squeue([self._job()])).state}"
        except SlurmError as error:
            return str(error)


class _Script:
    """The faults that are still to come, and the ends of those that last."""

    def __init__(self, faults: Sequence[Fault], weather: Weather) -> None:
        self._to_come = sorted(faults, key=lambda fault: (fault.step, fault.delay))
        self._weather = weather
        self._undo: list[tuple[float, Undo]] = []
        self._reached: dict[int, float] = {}
        self.done = 0

    def go_on(self, trained: int, job: str) -> None:
        """Do what is due."""
        now = time.monotonic()
        for due, undo in list(self._undo):
            if due <= now:
                self._undo.remove((due, undo))
                _try(undo)
        while self._to_come and self._is_due(self._to_come[0], trained, now):
            self._do(self._to_come.pop(0), job)

    def end_all(self) -> None:
        """End the faults that last."""
        for _, undo in self._undo:
            _try(undo)

    def _is_due(self, fault: Fault, trained: int, now: float) -> bool:
        if trained < fault.step:
            return False
        return now >= self._reached.setdefault(fault.step, now) + fault.delay

    def _do(self, fault: Fault, job: str) -> None:
        try:
            undo = self._weather.do(fault, job)
        except (NobodyError, TimeoutError, UserError, SlurmError) as error:
            print(f"{fault}: {error}", flush=True)
            return
        self.done += 1
        if undo:
            self._undo.append((time.monotonic() + (fault.seconds or 0.0), undo))


def _gaps(layout: RunLayout) -> tuple[float, ...]:
    times = [row["time"] for row in read_lines(layout.metrics)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return tuple(gap for gap in gaps if gap > _GAP_SECONDS)


def _try(undo: Undo) -> None:
    try:
        undo()
    except (NobodyError, TimeoutError, UserError) as error:
        print(f"end of a fault: {error}", flush=True)


def with_stand_ins(plan: JobPlan) -> JobPlan:
    """A job's plan with stand-ins for all roles."""
    return replace(
        plan,
        processes=tuple(replace(each, argv=(each.argv[0], "-m", ROLES)) for each in plan.processes),
    )


@contextmanager
def slurm_of(cluster: Sandbox) -> Iterator[None]:
    """Let this process's commands of Slurm go to a sandbox: submitit knows no other way."""
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = cluster.variables["SLURM_CONF"]
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
