"""The supervisor as the batch process of a Slurm job: steps instead of subprocesses, and requeues."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, TypeVar

from hpc.planning.slurm_tables import Value
from hpc.signals import hold_warning
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError
from hpc.slurm.records import JobDetail
from hpc.slurm.states import JobState
from hpc.supervisor.causes import Cause
from hpc.supervisor.launcher import Launcher
from hpc.supervisor.restart import (
    Action,
    Decision,
    Ending,
    JobView,
    Limits,
    bad_nodes,
    can_be_spared,
    decide,
    idle_attempts,
    idle_failures,
    why_not_begin,
)
from hpc.supervisor.srun import Allocation, SrunLauncher, failed_nodes
from hpc.supervisor.supervisor import BALLAST, JobFailedError, Supervisor
from rltrain import arguments
from rltrain.run.errors import EXIT_REQUEUE, UserError
from rltrain.run.files import StatusFile, append_event, read_json, read_lines
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.processes import way_to

_ENDED_BY_US = 60.0  # seconds that Slurm has to end this process after it took a requeue
_SILENCE_SECONDS = 600.0  # of slurmctld, before a requeue is given up
_ASK_AGAIN_SECONDS = 5.0
_SETTLE_SECONDS = 3.0  # a dead node, or a cancelled job, is first seen in the roles that die of it

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SlurmSupervisor(Supervisor):
    """Run one attempt of a job, and have Slurm run the next one if there should be one.

    Attributes:
        srun: further flags of srun.
        python: interpreter of the roles.
        limits: bounds of running again.
    """

    srun: Mapping[str, Value] = field(default_factory=dict)
    python: str = sys.executable
    limits: Limits = field(default_factory=Limits)
    takes_warnings: ClassVar = True  # of the time limit: `hpc.batch` holds them until it is ready

    def __call__(self) -> dict[str, Any]:
        """See `Supervisor`. Does not return if the job is requeued."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # before and after the attempt; during it, it is seen
        hold_warning()
        job = CurrentJob.from_env()
        layout = RunLayout(self.run_dir)
        if job.is_half_requeued() and job.restarts < self.limits.max_restarts:
            self._requeue(job, layout, "only a part of the job had been requeued")
        if is_finished(layout, arguments.load(layout.root).rollout.num_rollout):
            _say_finished(layout)
            return {"state": "finished", "reason": "an earlier job has finished the run", "saved": True}
        if reason := why_not_begin(read_lines(layout.events), self.limits, was_requeued=job.restarts > 0):
            _note(layout, "not_started", reason)
            print(
                f"nothing is started: {reason}. To try again: python -m hpc.resubmit {layout.root}",
                flush=True,
            )
            return {"state": "stopped", "reason": reason, "saved": False}
        try:
            report = super().__call__()
        except JobFailedError as error:
            self._after(job, layout, _failed_ending(layout, error))
            raise
        _note_failed_nodes(layout)
        idle = idle_attempts(read_lines(layout.events))
        ending = Ending(report["state"], report.get("signal"), idle_attempts=idle)
        self._after(job, layout, ending)
        return report

    def after_kill(self, number: int, for_memory: bool | None, begun: float) -> bool:
        """What `__call__` could not do because a signal ended its process: the batch process outlives it.

        Does not return if the job is requeued.

        Args:
            number: of the signal.
            for_memory: whether the out-of-memory killer sent it; None if nobody can tell.
            begun: when the process began, in Unix seconds.

        Returns:
            Whether the run is finished, so that nothing is lost.
        """
        job, layout = CurrentJob.from_env(), RunLayout(self.run_dir)
        if is_finished(layout, arguments.load(layout.root).rollout.num_rollout):
            _say_finished(layout)
            return True
        reason = f"the supervisor was killed by {signal.Signals(number).name}"
        if for_memory:
            reason += ": no memory left on the job's first node, give it more with `mem` in [slurm.sbatch]"
        print(reason, flush=True)
        # Of a person, or of Slurm before there was a supervisor.
        is_stop = number in (signal.SIGINT, signal.SIGTERM)
        state = "stopped" if is_stop else "failed"
        _end_attempt(layout, number, state, reason, begun)
        idle = idle_attempts(read_lines(layout.events))
        sent = signal.Signals(number).name if is_stop else None
        self._after(job, layout, Ending(state, sent, cause=Cause.UNKNOWN, idle_attempts=idle))
        return False

    def _after(self, job: CurrentJob, layout: RunLayout, ending: Ending) -> None:
        """Requeue the job, wait for Slurm to, or return."""
        if ending.state == "failed":
            job.wait_until_it_ends(_SETTLE_SECONDS)
        decision = decide(ending, job.view(), job.restarts, self.limits)
        if decision.action is Action.REQUEUE and signal.SIGINT in signal.sigpending():  # in the batch process
            decision = Decision(Action.END, "stopped on request")
        if decision.action is Action.REQUEUE:
            self._requeue(job, layout, decision.reason)
        if decision.action is Action.WAIT:
            _exclude_bad_nodes(job, layout)
            _wait_for_the_end()
        if ending.state != "finished":
            _note(layout, "not_requeued", decision.reason)
            print(
                f"not requeued: {decision.reason}. To continue: python -m hpc.resubmit {layout.root}",
                flush=True,
            )

    def _requeue(self, job: CurrentJob, layout: RunLayout, reason: str) -> None:
        _note(layout, "requeued", reason)
        print(f"requeue: {reason}", flush=True)
        try:
            _ask_until_answered(job.requeue)
        except SlurmError as error:
            print(f"Slurm did not requeue the job: {error}", flush=True)
            sys.exit(EXIT_REQUEUE)
        _exclude_bad_nodes(job, layout)
        _wait_for_the_end()

    def _launcher(self) -> Launcher:
        return SrunLauncher(Allocation.from_env(os.environ), self.srun, self.python)

    def _host(self) -> str:
        return choose_address(Allocation.from_env(os.environ), os.environ)


@dataclass(frozen=True)
class CurrentJob:
    """The job that this process is the batch script of.

    Attributes:
        restarts: how often it had been requeued when this attempt began.
    """

    job_id: str
    restarts: int
    client: SlurmClient

    @classmethod
    def from_env(cls) -> CurrentJob:
        """Read what Slurm tells the batch script."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return cls(os.environ["SLURM_JOB_ID"], restarts, SlurmClient(timeout_s=20))

    def details(self) -> list[JobDetail]:
        """Slurm's details of each component; none if Slurm does not answer."""
        try:
            return self.client.job_details(self.job_id)
        except SlurmError as error:
            print(f"Slurm can't be asked about job {self.job_id}: {error}", flush=True)
            return []

    def view(self) -> JobView | None:
        """The facts that `decide` needs; None if Slurm does not answer."""
        details = self.details()
        if not details:
            return None
        leader = details[0]
        return JobView(
            state=leader.state,
            restarts=max(each.restarts for each in details),
            may_requeue=all(each.requeue for each in details),
            is_preempted=any(each.preempted is not None for each in details),
            is_out_of_time=leader.state is JobState.TIMEOUT or leader.reason == "TimeLimit",
        )

    def is_half_requeued(self) -> bool:
        """Whether only this component was started again: the others have been running for longer."""
        if not self.restarts:
            return False
        started = [each.started for each in self.details() if each.started]
        return bool(started) and (max(started) - min(started)).total_seconds() > 1

    def wait_until_it_ends(self, seconds: float) -> None:
        """Give Slurm a moment to say that the job is over, or restarted."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            view = self.view()
            if view and (view.restarts > self.restarts or view.state is not JobState.RUNNING):
                return
            time.sleep(0.5)

    def requeue(self) -> None:
        """Back into the queue, with all components."""
        self.client.requeue(self.job_id)

    def exclude(self, bad: list[str]) -> None:
        """Avoid these nodes from now on, if there are enough others; Slurm accepts this for a waiting job only."""
        if not bad:
            return
        names = os.environ.get("SLURM_JOB_PARTITION", "").split(",")
        nodes = {node for each in self.client.partitions() if each.name in names for node in each.nodes}
        needed = len(Allocation.from_env(os.environ).all_nodes)
        listed = ",".join(can_be_spared(bad, nodes, needed))
        for each in self.details():
            self.client.run("scontrol", "update", f"JobId={each.raw_id}", f"ExcNodeList={listed}")


def choose_address(allocation: Allocation, env: Mapping[str, str], client: SlurmClient | None = None) -> str:
    """The address of this node that the job's other nodes reach; loopback if there are none. IPv4 where it has both.

    A node's own name may mean a loopback address to the node itself; then the way to another node tells. Names that DNS
    does not know are asked of Slurm.

    Raises:
        UserError: neither knows a node's address.
    """
    others = [node for node in allocation.all_nodes if node != env.get("SLURMD_NODENAME")]
    if not others:
        return "127.0.0.1"
    own = _address_of(env.get("SLURMD_NODENAME") or socket.gethostname(), client)
    if not own.startswith(("127.0.", "0.")) and own not in ("::1", "::"):
        return own
    return way_to(_address_of(others[0], client))


def _address_of(node: str, client: SlurmClient | None) -> str:
    try:
        return _look_up(node)
    except OSError as error:
        asked = client or SlurmClient()
        said = _ask_until_answered(lambda: asked.run("scontrol", "--oneliner", "show", "node", node))
        address = re.search(r"\bNodeAddr=(\S+)", said)
        try:
            return _look_up(address[1] if address else node)
        except OSError:
            raise UserError(
                f"the address of node {node} is not known: its name can't be looked up ({error.strerror or error}), nor"
                f" can Slurm's NodeAddr for it ({address[1] if address else 'none'}). It takes an IPv4 or IPv6 address."
            ) from None


def _look_up(name: str) -> str:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    addresses = [str(each[4][0]) for each in sorted(found, key=lambda each: each[0] != socket.AF_INET)]
    usable = [each for each in addresses if not each.startswith("fe80:")]  # that is of use on one cable only
    if not usable:
        raise OSError(f"it has only {', '.join(addresses)}")
    return usable[0]


def _say_finished(layout: RunLayout) -> None:
    """Have `status.json` say what the supervisor could not that was killed after the last step."""
    said = read_json(layout.status) or {}
    if said.get("phase") != "finished":
        StatusFile(layout.status, said.get("attempt", 0)).update({**said, "phase": "finished"})


def _end_attempt(layout: RunLayout, number: int, state: str, reason: str, begun: float) -> None:
    """Record the end of an attempt whose supervisor was killed, even before it had begun."""
    marks = ("attempt_started", "attempt_finished", "never_begun")
    events = [event for event in read_lines(layout.events) if event.get("kind") in marks]
    if not events or events[-1]["kind"] != "attempt_started":
        if not events or events[-1].get("time", 0.0) < begun:  # else its end is written down already
            _note(layout, "never_begun", reason)
        return
    attempt = events[-1]["attempt"]
    (layout.log_dir(attempt) / BALLAST).unlink(missing_ok=True)
    fields = {"state": state, "exit_code": -number, "reason": reason, "cause": Cause.UNKNOWN}
    said = read_json(layout.status) or {}
    try:
        append_event(layout.events, attempt, "attempt_finished", fields)
        StatusFile(layout.status, attempt).update({**said, "phase": state})
    except OSError as error:
        print(f"the end of the attempt can't be recorded: {error}", flush=True)


def _failed_ending(layout: RunLayout, error: JobFailedError) -> Ending:
    nodes = _note_failed_nodes(layout)
    events = read_lines(layout.events)
    return Ending(
        "failed",
        never_restart=error.never_restart,
        node_failed=bool(nodes),
        cause=error.cause,
        idle_failures=idle_failures(events),
        idle_attempts=idle_attempts(events),
    )


def _exclude_bad_nodes(job: CurrentJob, layout: RunLayout) -> None:
    """Let the attempt that waits now avoid nodes that failed repeatedly."""
    try:
        job.exclude(bad_nodes(read_lines(layout.events), time.time()))
    except SlurmError as error:
        print(f"nodes that failed could not be excluded: {error}", flush=True)


def _note_failed_nodes(layout: RunLayout) -> list[str]:
    nodes = failed_nodes(layout.log_dir(max(layout.attempts())))
    for node in nodes:
        append_event(layout.events, max(layout.attempts()), "node_failed", {"node": node})
    return nodes


def _note(layout: RunLayout, kind: str, reason: str) -> None:
    append_event(layout.events, max(layout.attempts(), default=0), kind, {"reason": reason})


def _ask_until_answered(ask: Callable[[], Answer]) -> Answer:
    """A controller that restarts or is overloaded must not cost the run its next attempt.

    Raises:
        SlurmError: Slurm refuses, or is silent for too long.
    """
    deadline = time.monotonic() + _SILENCE_SECONDS
    while True:
        try:
            return ask()
        except SlurmUnavailableError as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error} Asking again.", flush=True)
            time.sleep(_ASK_AGAIN_SECONDS)


def _wait_for_the_end() -> NoReturn:
    """Slurm ends this process; leave without a result, because another attempt follows."""
    time.sleep(_ENDED_BY_US)
    sys.exit(EXIT_REQUEUE)
