"""How long a run had no step after a fault, and the least that it could have been."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.chaos.faults import Fault
from rltrain.run.files import GrowingLines, Record


class SeenLines:
    """The lines of a file that grows, with the time at which each was seen: the clock of who wrote it may jump.

    Threads may look at the same time.
    """

    def __init__(self, path: Path) -> None:
        self._lines, self._lock = GrowingLines(path), threading.Lock()
        self.seen: list[Record] = []

    def look(self) -> list[Record]:
        """All of them; those that are new since the last look get the time of now."""
        with self._lock:
            now = time.time()
            self.seen += ({**line, "time": now} for line in self._lines.read())
            return list(self.seen)


@dataclass(frozen=True)
class Recovery:
    """What became of a run after a fault.

    Attributes:
        fault: that it met.
        seconds: from the fault to the next trained step; of several pauses before the next fault, the longest.
        least: of these, those that no run can do without: in the hands of Slurm between two attempts, and as long as
            this run's roles took to start when nothing was amiss. 0 if no attempt had to begin.
    """

    fault: Fault
    seconds: float
    least: float


def recoveries(
    done: Sequence[tuple[Fault, float]], rows: Sequence[Record], events: Sequence[Record]
) -> tuple[Recovery, ...]:
    """The recovery from each fault after which a step was trained.

    Args:
        done: faults, and when they were done (Unix seconds), in that order.
        rows: of `metrics.jsonl`, by the same clock.
        events: of `events.jsonl`, by the same clock.
    """
    times = [row["time"] for row in rows]
    found = []
    for index, (fault, begun) in enumerate(done):
        over = done[index + 1][1] if index + 1 < len(done) else float("inf")
        pauses = [(max(before, begun), after) for before, after in itertools.pairwise(times)
                  if after > begun and before < over]  # fmt: skip
        if pauses:
            begin, end = max(pauses, key=lambda pause: pause[1] - pause[0])
            least = _least(begin, end, times, events)
            found.append(Recovery(fault, end - begin, least))
    return tuple(found)


def _least(begin: float, end: float, times: Sequence[float], events: Sequence[Record]) -> float:
    starts = [event["time"] for event in events if event["kind"] == "attempt_started"]
    if not any(begin < start <= end for start in starts):
        return 0.0
    queued = 0.0
    for start in (start for start in starts if begin < start <= end):
        before = [event["time"] for event in events if event["time"] < start]
        queued += start - max([begin, *before[-1:]])
    return queued + min((time for time in times if time > starts[0]), default=starts[0]) - starts[0]


def table(all_recoveries: Sequence[Recovery]) -> list[str]:
    """Lines with the median and the longest recovery from each kind of fault, and the median of the least."""
    by_kind: dict[str, list[Recovery]] = {}
    for each in all_recoveries:
        by_kind.setdefault(each.fault.kind, []).append(each)
    lines = [f"{'fault':19}{'times':>6}{'median':>10}{'longest':>10}{'least':>10}   seconds without a step"]
    for kind, group in sorted(by_kind.items()):
        seconds = [each.seconds for each in group]
        least = statistics.median(each.least for each in group)
        lines.append(
            f"{kind:19}{len(group):6}{statistics.median(seconds):10.1f}{max(seconds):10.1f}{least:10.1f}"
        )
    return lines
