"""The faults of a storm: what may go wrong, when, and to whom. Pure; `actions.py` does them.

A storm is a list of faults that is drawn with a seed, and is written as words, so that it can be repeated:

    kill:engine-0@12 requeue@20+0.4 freeze:trainer-1@31~2.5
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.run.errors import UserError

ROLES = ("router-0", "engine-0", "engine-1", "rollout-0", "trainer-0", "trainer-1")
_REVIVED = ("router-0", "engine-0", "engine-1")
NODES = ("node1", "node2", "node3", "node4")
_CLOSE_SECONDS = 1.0
_IN_CLOSE_PAIR = 0.25  # share of the faults that follow the one before within a second
_WORD = re.compile(r"([a-z-]+)(?::([\w-]+))?@(\d+)(?:\+([\d.]+))?(?:~([\d.]+))?")


class NobodyError(Exception):
    """The fault has no target at the moment: its role, step or job does not exist."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        what: in words.
        targets: whom it may meet; empty if it meets the job.
        seconds: bounds of how long it lasts; None for one that is over at once.
        needs_a_hand: the run may end, and a person resubmits it, once a fault that lasts is over.
        is_real: stand-ins have nothing that it could meet.
        weight: how often it is drawn, against the others; 0 if only somebody who names it wants it.
    """

    what: str
    targets: tuple[str, ...] = ()
    seconds: tuple[float, float] | None = None
    needs_a_hand: bool = False
    is_real: bool = False
    weight: int = 2


KINDS = {
    "kill": Kind("SIGKILL for the process of a role", ROLES, weight=6),
    "freeze": Kind("SIGSTOP for the process of a role, and SIGCONT later", ROLES, (0.2, 3.0), weight=4),
    "end-step": Kind("SIGKILL for the srun of a role's step", ROLES),
    "lose-step": Kind("SIGKILL for the slurmstepd of a role's step", ROLES),
    "requeue": Kind("scontrol requeue", weight=4),
    "requeue-part": Kind(
        "the power of the batch node is cut: of a job whose first part has no other, Slurm requeues only that part",
        seconds=(0.5, 3.0),
    ),
    "warn": Kind("SIGUSR2 for the batch process, as when the time limit is near", weight=4),
    "terminate": Kind("SIGTERM for the steps, as in a preemption with grace time", needs_a_hand=True),
    "suspend": Kind("scontrol suspend, and resume later", seconds=(0.5, 3.0)),
    "power-off": Kind("the power of a node is cut, and comes back", NODES, (0.5, 3.0), weight=3),
    "cut-off": Kind("a node is cut off from the network, and joined again later", NODES, (0.5, 12.0)),
    "lose-names": Kind("the nodes' names do not resolve, as in a DNS outage", seconds=(0.5, 5.0)),
    "fill-disk": Kind("the disk of the run is full for a while", seconds=(0.5, 4.0), needs_a_hand=True),
    "lock-checkpoints": Kind(
        "nothing can be written in the directory of checkpoints", seconds=(0.5, 4.0), needs_a_hand=True
    ),
    "slow-disk": Kind("the disk of the run writes only a fifth of the time", seconds=(2.0, 12.0)),
    "stall-disk": Kind("the disk of the run writes nothing for a while: writers wait", seconds=(0.5, 10.0)),
    "clock-ahead": Kind("the clock of a node jumps ahead by an hour, and back later", NODES, (0.5, 8.0)),
    "clock-behind": Kind("the clock of a node jumps back by an hour, and ahead later", NODES, (0.5, 8.0)),
    "silence": Kind("slurmctld does not answer for a while", seconds=(0.5, 8.0)),
    "restart-controller": Kind("slurmctld is killed and started again"),
    "fail-over": Kind(
        "slurmctld is killed, its backup takes over, and it comes back; takes a sandbox with a backup",
        seconds=(0.5, 8.0),
        weight=0,
    ),
    "cancel": Kind("scancel", needs_a_hand=True),
    "late-sbatch": Kind(
        "scancel, and the sbatch that resubmits the run reports the job's id eight seconds late",
        needs_a_hand=True,
    ),
    "refuse-step": Kind(
        "SIGKILL for a role, and Slurm refuses to start any role for a while", _REVIVED, (0.5, 10.0)
    ),
    "stall-engine": Kind(
        "an engine answers, and makes no progress: SIGSTOP for its scheduler",
        ("engine-0", "engine-1"),
        (5.0, 70.0),
        is_real=True,
    ),
    "hang-reward": Kind(
        "rewards stop coming: SIGSTOP for the processes that grade", seconds=(1.0, 20.0), is_real=True
    ),
    "freeze-supervisor": Kind(
        "SIGSTOP for the supervisor, for longer than stand-in roles wait for it", seconds=(0.5, 15.0)
    ),
    "kill-supervisor": Kind("SIGKILL for the supervisor"),
    "kill-batch": Kind("SIGKILL for the batch process, which ends the job", needs_a_hand=True),
    "tear-metrics": Kind("the last line of metrics.jsonl is a torn one, as a crash in the middle leaves it"),
    "tear-events": Kind("the last line of events.jsonl is a torn one"),
}


@dataclass(frozen=True)
class Fault:
    """One fault of a storm.

    Attributes:
        kind: a key of `KINDS`.
        step: it comes when this many steps are trained, counted over all attempts.
        target: the role or node that it meets; None for the job.
        delay: seconds after that.
        seconds: how long it lasts; None for one that is over at once.
    """

    kind: str
    step: int
    target: str | None = None
    delay: float = 0.0
    seconds: float | None = None

    def __str__(self) -> str:
        target = f":{self.target}" if self.target else ""
        delay = f"+{self.delay:g}" if self.delay else ""
        seconds = f"~{self.seconds:g}" if self.seconds is not None else ""
        return f"{self.kind}{target}@{self.step}{delay}{seconds}"


def draw(seed: int, count: int, steps: int, *, real: bool = False) -> tuple[Fault, ...]:
    """Draw the faults of a storm.

    Args:
        seed: the same seed gives the same storm.
        count: number of faults.
        steps: that the run trains; faults come between its first and its last.
        real: whether the run has real roles, not stand-ins.
    """
    chance = random.Random(seed)
    kinds = [name for name, kind in KINDS.items() if real or not kind.is_real]
    weights = [KINDS[name].weight for name in kinds]
    found: list[Fault] = []
    for _ in range(count):
        name = chance.choices(kinds, weights)[0]
        kind = KINDS[name]
        close = bool(found) and chance.random() < _IN_CLOSE_PAIR
        step = found[-1].step if close else chance.randint(1, max(1, steps - 1))
        delay = found[-1].delay + chance.uniform(0, _CLOSE_SECONDS) if close else chance.uniform(0, 0.5)
        seconds = round(chance.uniform(*kind.seconds), 2) if kind.seconds else None
        target = chance.choice(kind.targets) if kind.targets else None
        found.append(Fault(name, step, target, round(delay, 2), seconds))
    return tuple(sorted(found, key=lambda fault: (fault.step, fault.delay)))


def parse(words: Sequence[str]) -> tuple[Fault, ...]:
    """The inverse of `str` for each fault.

    Raises:
        UserError: a word says no fault.
    """
    return tuple(_parse_word(word) for word in words)


def _parse_word(word: str) -> Fault:
    match = _WORD.fullmatch(word)
    kind = KINDS.get(match[1]) if match else None
    if match is None or kind is None:
        raise UserError(f"{word!r} is not a fault like kill:engine-0@12+0.5~2. Kinds: {', '.join(KINDS)}.")
    if (match[2] or "") not in (kind.targets or ("",)):
        raise UserError(f"{word!r}: {match[1]} takes {', '.join(kind.targets) or 'no target'}.")
    seconds = float(match[5]) if match[5] else kind.seconds[0] if kind.seconds else None
    return Fault(match[1], int(match[3]), match[2], float(match[4] or 0), seconds)
