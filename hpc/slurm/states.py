"""Every state of a job that Slurm's commands print, and what it means for a program that waits for the job.

Source of the words: JOB STATE CODES in squeue(1) and sacct(1), Slurm 22.05 to 25.05.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class JobState(StrEnum):
    """State of one component of a job, as a word; UNKNOWN if Slurm does not know the job, or the word is unknown."""

    PENDING = "PENDING"
    CONFIGURING = "CONFIGURING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    STOPPED = "STOPPED"
    RESIZING = "RESIZING"
    SIGNALING = "SIGNALING"
    STAGE_OUT = "STAGE_OUT"
    COMPLETING = "COMPLETING"
    REQUEUED = "REQUEUED"
    REQUEUE_FED = "REQUEUE_FED"
    REQUEUE_HOLD = "REQUEUE_HOLD"
    RESV_DEL_HOLD = "RESV_DEL_HOLD"
    SPECIAL_EXIT = "SPECIAL_EXIT"
    POWER_UP_NODE = "POWER_UP_NODE"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    PREEMPTED = "PREEMPTED"
    NODE_FAIL = "NODE_FAIL"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    BOOT_FAIL = "BOOT_FAIL"
    LAUNCH_FAILED = "LAUNCH_FAILED"
    RECONFIG_FAIL = "RECONFIG_FAIL"
    DEADLINE = "DEADLINE"
    REVOKED = "REVOKED"
    UNKNOWN = "UNKNOWN"

    @property
    def is_final(self) -> bool:
        """Whether this attempt is over.

        A requeued job's next attempt is a record of its own: once Slurm has written it, that one is the job's state.
        """
        return self in _FINAL

    @property
    def is_waiting(self) -> bool:
        """True if it holds no nodes yet, but will."""
        return self in _WAITING


_FINAL = frozenset(
    {
        *(JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.OUT_OF_MEMORY, JobState.REVOKED),
        *(JobState.PREEMPTED, JobState.TIMEOUT, JobState.NODE_FAIL, JobState.BOOT_FAIL, JobState.DEADLINE),
        *(JobState.LAUNCH_FAILED, JobState.RECONFIG_FAIL),
    }
)
_WAITING = frozenset(
    {
        *(JobState.PENDING, JobState.REQUEUED, JobState.REQUEUE_FED, JobState.REQUEUE_HOLD),
        *(JobState.RESV_DEL_HOLD, JobState.SPECIAL_EXIT),
    }
)
_BY_CODE = {
    "PD": JobState.PENDING,
    "CF": JobState.CONFIGURING,
    "R": JobState.RUNNING,
    "S": JobState.SUSPENDED,
    "ST": JobState.STOPPED,
    "RS": JobState.RESIZING,
    "SI": JobState.SIGNALING,
    "SO": JobState.STAGE_OUT,
    "CG": JobState.COMPLETING,
    "RQ": JobState.REQUEUED,
    "RF": JobState.REQUEUE_FED,
    "RH": JobState.REQUEUE_HOLD,
    "RD": JobState.RESV_DEL_HOLD,
    "SE": JobState.SPECIAL_EXIT,
    "CD": JobState.COMPLETED,
    "F": JobState.FAILED,
    "CA": JobState.CANCELLED,
    "TO": JobState.TIMEOUT,
    "PR": JobState.PREEMPTED,
    "NF": JobState.NODE_FAIL,
    "OOM": JobState.OUT_OF_MEMORY,
    "BF": JobState.BOOT_FAIL,
    "LF": JobState.LAUNCH_FAILED,
    "DL": JobState.DEADLINE,
    "RV": JobState.REVOKED,
}
# If components disagree, the state that says most about the job: it is alive while any of them is.
_PRECEDENCE = (
    *(JobState.RUNNING, JobState.SUSPENDED, JobState.STOPPED, JobState.CONFIGURING, JobState.POWER_UP_NODE),
    *(JobState.RESIZING, JobState.SIGNALING, JobState.STAGE_OUT, JobState.COMPLETING),
    *(JobState.PENDING, JobState.REQUEUED, JobState.REQUEUE_FED, JobState.REQUEUE_HOLD),
    *(JobState.RESV_DEL_HOLD, JobState.SPECIAL_EXIT),
    *(
        JobState.OUT_OF_MEMORY,
        JobState.FAILED,
        JobState.NODE_FAIL,
        JobState.BOOT_FAIL,
        JobState.LAUNCH_FAILED,
    ),
    *(JobState.RECONFIG_FAIL, JobState.TIMEOUT, JobState.DEADLINE, JobState.PREEMPTED, JobState.CANCELLED),
    *(JobState.REVOKED, JobState.COMPLETED, JobState.UNKNOWN),
)


def parse_state(text: str) -> JobState:
    """A state as Slurm's commands print it: `CANCELLED by 0`, `RUNNING`, `PD`."""
    word = text.split()[0] if text.strip() else ""
    if word in _BY_CODE:
        return _BY_CODE[word]
    return JobState(word) if word in JobState.__members__ else JobState.UNKNOWN


def combined(states: Iterable[JobState]) -> JobState:
    """State of a job from its components' states; UNKNOWN if there are none."""
    return min(states, key=_PRECEDENCE.index, default=JobState.UNKNOWN)
