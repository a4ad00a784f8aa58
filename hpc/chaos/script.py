"""Does the faults of a storm when they are due, and ends those that last.

Each has a thread of its own: one may have to wait for a Slurm that another has silenced, and the third must not wait.
"""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from hpc.chaos.actions import Undo
from hpc.chaos.faults import KINDS, Fault, NobodyError
from rltrain.run.errors import UserError

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 90.0  # with a command of Slurm that is under way when the run ends


class Script:
    """The faults of a storm; enter it while the run is under way.

    Args:
        faults: of the storm.
        do: does one; returns what ends it, for one that lasts.
        trained: the number of steps that are trained now.
        until: the time (of `time.monotonic`) after which no fault begins.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        do: Callable[[Fault], Undo | None],
        trained: Callable[[], int],
        until: float = math.inf,
    ) -> None:
        self._to_come = sorted(faults, key=lambda fault: (fault.step, fault.delay))
        self._do, self._trained, self._until = do, trained, until
        self._reached: dict[int, float] = {}
        self._lasting: list[Fault] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="script", daemon=True)]
        self.done: list[tuple[Fault, float]] = []  # and when, Unix seconds

    def __enter__(self) -> Script:
        self._threads[0].start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def is_calm(self) -> bool:
        """Whether no fault lasts."""
        return not self._lasting

    @property
    def keeps_people_away(self) -> bool:
        """Whether a fault lasts that a person would first mend, before resubmitting the run."""
        return any(KINDS[fault.kind].needs_a_hand for fault in self._lasting)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            trained, now = self._trained(), time.monotonic()
            while self._to_come and self._is_due(self._to_come[0], trained, now):
                thread = threading.Thread(target=self._play, args=(self._to_come.pop(0),), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _is_due(self, fault: Fault, trained: int, now: float) -> bool:
        if trained < fault.step or now > self._until:
            return False
        return now >= self._reached.setdefault(fault.step, now) + fault.delay

    def _play(self, fault: Fault) -> None:
        begun = time.time()
        undo = _try(lambda: self._do(fault), fault, lambda: self.done.append((fault, begun)))
        if undo is None:
            return
        self._lasting.append(fault)
        self._over.wait(fault.seconds or 0.0)
        try:
            _try(undo, fault)
        finally:
            self._lasting.remove(fault)


def _try(
    act: Callable[[], object], fault: Fault, then: Callable[[], object] = lambda: None
) -> Callable[[], object] | None:
    try:
        undo = act()
    except (NobodyError, TimeoutError, UserError, subprocess.SubprocessError, OSError) as error:
        print(f"{fault}: {error}", flush=True)
        return None
    then()
    return undo if callable(undo) else None
