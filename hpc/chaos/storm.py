"""One storm: submit a run, do the faults at their steps, resubmit it where a person would, and judge it at its end."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.chaos import clocks, records, roles, verdict
from hpc.chaos.actions import Weather, fakes_of
from hpc.chaos.faults import KINDS, Fault
from hpc.chaos.operator import Operator
from hpc.chaos.records import Kept
from hpc.chaos.recovery import Recovery, SeenLines, recoveries
from hpc.chaos.script import Script
from hpc.planning.processes import JobPlan
from hpc.planning.request import SubmitOptions
from hpc.resubmit import merge_options
from hpc.runs.find import read_submissions
from hpc.sandbox import Sandbox
from hpc.slurm.client import SlurmClient, SlurmError, status_of
from hpc.slurm.states import JobState
from hpc.submitting import run_dir
from hpc.submitting.command_line import read_request
from hpc.submitting.slurm_job import plan_job, submit_job
from hpc.supervisor.restart import Limits, idle_attempts
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError
from rltrain.run.files import Record
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows
from rltrain.run.terminal import safe_text

ROLES = "hpc.chaos.roles"
SAVE_INTERVAL = 5  # steps
FLAGS = (
    *("--partition=gpu", "--num-gpus-per-node=1", "--time=1:00:00", "--max-failures=3"),
    *("--rollout-batch-size=1", "--n-samples-per-prompt=2", "--global-batch-size=2"),
    f"--save-interval={SAVE_INTERVAL}",
)
NOWHERE = ("--hf-checkpoint=/nowhere", "--prompt-data=/nowhere")
WITHOUT_WANDB, WANDB_OFFLINE = ("--wandb-mode=disabled",), ("--wandb-mode=offline",)
# A port where nobody listens: W&B tries it again until it gives up, as with a server that is silent.
WANDB_SILENT = ("--wandb-mode=online", "--wandb-host=http://127.0.0.1:9")
_OF_WANDB = {
    # Else each attempt waits a minute and a half.
    "WANDB_INIT_TIMEOUT": "2",
    "WANDB_API_KEY": "0" * 40,
}
_POLL_SECONDS = 0.5  # each look is a question to Slurm; faults have a clock of their own
_GIVE_UP_SECONDS = 60.0
# For a run to end when the time is over, and in which it then must have shown a sign of life.
TO_END_SECONDS, _SIGN_SECONDS = 240.0, 180.0
_MAX_HANDS = 20
_LAST_EVENTS = 20  # that are shown of a run with problems


@dataclass(frozen=True)
class Outcome:
    """What became of a storm.

    Attributes:
        faults: that were drawn.
        done: how many of them met somebody.
        hands: how often the run had to be resubmitted.
        seconds: from submission to the end.
        recoveries: from each fault to the next step.
        problems: what is not as it must be, in words; empty if all is.
        kept: what of the samples outlived its attempt; None for stand-ins, which have no samples.
        unjudged: why nobody knows whether all is; empty if it was judged.
        events: the last ones of a run with problems, in words.
    """

    faults: tuple[Fault, ...]
    done: int
    hands: int
    seconds: float
    recoveries: tuple[Recovery, ...]
    problems: tuple[str, ...]
    kept: Kept | None = None
    unjudged: str = ""
    events: tuple[str, ...] = ()


class Storm:
    """A storm over a run of stand-ins on a sandbox.

    Args:
        cluster: that is up.
        runs_dir: where the run is made.
        name: of the run.
        steps: that it trains.
        timeout: seconds after which it counts as stuck.
        nodes: of the job: 4, two of which train, or 3, of which one does.
        real: a directory of the demo's files: the run has real engines and a real trainer of its tiny model.
        flags: further ones.
        undisturbed: a real run of the same flags that nothing has happened to; samples must be the same.
    """

    def __init__(
        self,
        cluster: Sandbox,
        runs_dir: Path,
        name: str,
        steps: int = 60,
        timeout: float = 600.0,
        nodes: int = 4,
        real: Path | None = None,
        flags: Sequence[str] | None = None,
        undisturbed: Path | None = None,
    ) -> None:
        self._cluster, self._steps, self._timeout = cluster, steps, timeout
        if flags is None:
            flags = WITHOUT_WANDB if real is None else WANDB_OFFLINE
        self._real, self._undisturbed = real, RunLayout(undisturbed) if undisturbed else None
        self._flags = (f"--nodes={nodes}", *flags, *(NOWHERE if real is None else flags_of_demo(real)))
        self._layout = RunLayout(runs_dir.resolve() / name)
        self._client = SlurmClient(cluster.env)
        self._weather = Weather(cluster, self._layout)
        self._operator = Operator(cluster, self._layout.submitit)
        self._rows, self._events = SeenLines(self._layout.metrics), SeenLines(self._layout.events)
        # Times that the run gave up, as it should: faults left it no time to save anything.
        self._worn_out = 0

    @property
    def run_dir(self) -> Path:
        """Of the run, once it is submitted."""
        return self._layout.root

    def run(self, faults: Sequence[Fault], until: float = math.inf) -> Outcome:
        """Run it to its end, and judge it.

        Args:
            faults: of the storm.
            until: the time (of `time.monotonic`) after which no fault begins, and the run has TO_END_SECONDS to end.
        """
        faults = tuple(faults)
        begun = time.monotonic()
        before = verdict.traces(self._cluster)
        with slurm_of(self._cluster):
            self._submit()
            with Script(
                faults, lambda fault: self._weather.do(fault, self._job()), self._trained, until
            ) as script:
                hands, stuck = self._weather_it(script, min(begun + self._timeout, until + TO_END_SECONDS))
            ended = time.monotonic()
            if until + TO_END_SECONDS < ended < begun + self._timeout and stuck and self._shows_life():
                self._give_up()
                return Outcome(faults, len(script.done), hands, ended - begun, (), (), unjudged=stuck[0])
            curve = roles.curve(self._steps) if self._real is None else None
            may_fail = any(KINDS[fault.kind].needs_a_hand for fault in faults)
            found = verdict.judge(
                self._layout, self._steps, self._cluster, curve, before, may_fail=may_fail or bool(stuck)
            )
            problems = [*stuck, *found]
            if stuck:
                self._give_up()
        kept = None
        if self._real is not None and not stuck:
            more, kept = self._judge_records()
            problems += more
        allowed = sum(KINDS[fault.kind].needs_a_hand for fault in faults) + self._worn_out
        if hands > allowed:
            problems.append(f"{hands} times the run ended and had to be resubmitted; {allowed} times it may")
        seconds = time.monotonic() - begun
        done = sorted(script.done, key=lambda each: each[1])
        after = recoveries(done, self._rows.seen, self._events.seen)
        events = tuple(map(_in_words, self._events.look()[-_LAST_EVENTS:])) if problems else ()
        return Outcome(faults, len(done), hands, seconds, after, tuple(problems), kept, events=events)

    def _judge_records(self) -> tuple[list[str], Kept | None]:
        try:
            return records.judge(self._layout, self._steps, self._undisturbed)
        except (ArithmeticError, LookupError, OSError, ValueError) as error:
            return [f"its records can't be read: {type(error).__name__}: {error}"], None

    def _shows_life(self) -> bool:
        lines = [*self._rows.look(), *self._events.look()]
        return max((line["time"] for line in lines), default=0.0) > time.time() - _SIGN_SECONDS

    def _weather_it(self, script: Script, deadline: float) -> tuple[int, list[str]]:
        hands, begun = 0, time.monotonic()
        # Slurm may take minutes to clean up where a node was lost; a finished run is over.
        while not is_finished(self._layout, self._steps) or self._is_alive(but_completing=True):
            if time.monotonic() > deadline:
                return hands, [f"not finished after {time.monotonic() - begun:.0f} s: {self._state()}"]
            was_suspended = any(fault.kind == "suspend" for fault, _ in script.done)
            self._operator.look(self._job(), was_suspended=was_suspended, is_calm=script.is_calm)
            if self._is_over() and not script.keeps_people_away:
                if hands == _MAX_HANDS:
                    return hands, [f"not finished after {hands} times of resubmitting"]
                worn_out = self._is_worn_out(script)
                if self._resubmit():
                    hands += 1
                    self._worn_out += worn_out
            time.sleep(_POLL_SECONDS)
        return hands, []

    def _give_up(self) -> None:
        """End the job of a run that is stuck: the next storm takes its nodes."""
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while self._is_alive() and time.monotonic() < deadline:
            with suppress(subprocess.CalledProcessError):  # slurmctld may not answer
                self._cluster.run("scancel", self._job())
            time.sleep(1.0)

    def _submit(self) -> None:
        words = [
            *FLAGS,
            *self._flags,
            f"--name={self._layout.name}",
            f"--runs-dir={self._layout.root.parent}",
        ]
        request = read_request([*words, f"--num-rollout={self._steps}"])
        self._send(request.options, request.train)

    def _is_worn_out(self, script: Script) -> bool:
        """Whether so many attempts in a row saved nothing that the run ends, and faults are why: most had one, and none
        of them had the time to save."""
        events, most = self._events.look(), Limits().max_idle
        if idle_attempts(events) < most:
            return False
        saved = max((event["time"] for event in events if event["kind"] == "checkpoint_saved"), default=0.0)
        begins = [event for event in events if event["kind"] in ("attempt_started", "never_begun")]
        # A fault that ended the attempt before these, or lasts, counts, too.
        since = max([saved, *(event["time"] for event in begins[:-most][-1:])])
        near = sum(begun > since for _, begun in script.done)
        return 2 * near > most and not self._had_time_to_save({event["attempt"] for event in begins[-most:]})

    def _had_time_to_save(self, attempts: set[int]) -> bool:
        """Whether one of these attempts trained for two intervals of saving, and does not say that saving failed."""
        failed = {each["attempt"] for each in self._events.look() if each["kind"] == "checkpoint_failed"}
        steps = {(row["attempt"], row["step"]) for row in self._rows.look() if "rollout/reward" in row}
        trained = Counter(attempt for attempt, _ in steps)
        return any(trained[attempt] >= 2 * SAVE_INTERVAL for attempt in attempts - failed)

    def _resubmit(self) -> bool:
        """What a person does: `python -m hpc.resubmit`, and again when Slurm does not answer."""
        options, _ = merge_options(self._layout, [])
        try:
            self._send(options, run_dir.stored_flags(self._layout))
        except (SlurmError, UserError) as error:
            print(f"resubmit: {error}", flush=True)
            time.sleep(1.0)
            return False
        return True

    def _send(self, options: SubmitOptions, flags: Flags) -> None:
        tables = clocks.that_can_jump(options.slurm, self._cluster.directory)
        job = plan_job(replace(options, slurm=tables), flags, check=lambda config: config)
        plan = job.plan if self._real else with_stand_ins(job.plan)
        submit_job(replace(job, plan=plan))

    def _trained(self) -> int:
        self._events.look()
        return max(newest_rows(self._rows.look()), default=-1) + 1

    def _job(self) -> str:
        return read_submissions(self._layout)[-1].job_id

    def _is_over(self) -> bool:
        return not self._is_alive() and not is_finished(self._layout, self._steps)

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


def _in_words(event: Record) -> str:
    told = " ".join(
        f"{name}={event[name]}"
        for name in ("role", "index", "host", "step", "state", "reason")
        if name in event
    )
    return safe_text(f"attempt {event.get('attempt')}: {event.get('kind')} {told}")


def flags_of_demo(directory: Path) -> tuple[str, ...]:
    """Flags of a real run of the demo's model and prompts."""
    return (
        *(f"--hf-checkpoint={directory / 'model'}", f"--prompt-data={directory / 'train.jsonl'}"),
        *("--custom-rm-path=rltrain.demo.task.reward", "--label-key=label", "--no-bf16", "--lr=1e-4"),
        "--random-init",
        *("--rollout-max-response-len=16", "--no-use-distributed-optimizer"),
        "--sglang-enable-deterministic-inference",
    )


def with_stand_ins(plan: JobPlan) -> JobPlan:
    """A job's plan with stand-ins for all roles."""
    return replace(
        plan,
        processes=tuple(replace(each, argv=(each.argv[0], "-m", ROLES)) for each in plan.processes),
    )


@contextmanager
def slurm_of(cluster: Sandbox) -> Iterator[None]:
    """Let this process's commands of Slurm go to a sandbox, past the fakes that do faults: submitit knows no other way.

    Jobs that are submitted meanwhile get the same variables.
    """
    fakes, place = fakes_of(cluster), verdict.temporary_directory(cluster)
    fakes.make()
    place.mkdir(exist_ok=True)
    ours = {
        "SLURM_CONF": cluster.variables["SLURM_CONF"],
        "PATH": f"{fakes.directory}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(place),
        **_OF_WANDB,
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
