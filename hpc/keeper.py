"""The batch process of a job: it forks the supervisor, hands on the signals that it gets, and outlives it.

When the batch process of a Slurm job is killed the job has failed, and Slurm requeues nothing. The out-of-memory killer
takes the largest process of the batch step, which is the supervisor.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

from rltrain.run.processes import die_with_parent, oom_kills, send_signal

_HANDED_ON = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}


@dataclass(frozen=True)
class ChildEnd:
    """How the child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        for_memory: whether the out-of-memory killer sent that signal; None if nobody can tell.
        begun: when it began, in Unix seconds.
        interrupted: whether SIGINT came, with which a person stops a job.
    """

    code: int
    for_memory: bool | None
    begun: float
    interrupted: bool

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it."""
        return self.code < 0


def keep() -> ChildEnd | None:
    """Fork. Returns None in the child, which goes on; the parent waits for its end, and returns how that was.

    In the parent the signals that it hands on stay blocked. Call it while the process has one thread.
    """
    kills, parent, begun = oom_kills(), os.getpid(), time.time()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_HANDED_ON, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None
    for number in _HANDED_ON:  # not every kernel keeps a signal that is ignored
        signal.signal(number, _nothing)
    interrupted = False
    while True:
        came = signal.sigwaitinfo({*_HANDED_ON, signal.SIGCHLD}).si_signo
        interrupted |= came == signal.SIGINT
        if came != signal.SIGCHLD:
            send_signal(child, signal.Signals(came))
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            now = oom_kills()
            for_memory = None if now is None or kills is None else now > kills
            return ChildEnd(os.waitstatus_to_exitcode(status), for_memory, begun, interrupted)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Never called: the signal is blocked."""
