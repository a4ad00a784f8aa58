"""A disk that stops: nothing is written, nobody gets an error, and who writes waits and can't even be killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hpc.chaos.faults import NobodyError
from hpc.sandbox.packages import find_program

# It ends when its input does, so that the disk goes on however we end. The pauses make a slow disk of one that stops.
_SCRIPT = """\
"$1" --freeze "$2" && echo stopped || exit
while :; do
    read -r -t "$3"
    waited=$?
    "$1" --unfreeze "$2"
    [ $waited -gt 128 ] || exit
    read -r -t "$4"
    [ $? -gt 128 ] || exit
    "$1" --freeze "$2" || exit
done
"""


class Stops:
    """A disk stops, from now until `end`.

    Args:
        disk: a directory on it.
        seconds: for which it stops at a time.
        pause: seconds between two stops.

    Raises:
        NobodyError: it can't be stopped, or has been.
    """

    def __init__(self, disk: Path, seconds: float, pause: float = 0.1) -> None:
        words = [find_program("fsfreeze"), str(disk), str(seconds), str(pause)]
        self._process = subprocess.Popen(
            [find_program("bash"), "-c", _SCRIPT, "stops", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a Ctrl-C is not for it
        )
        assert self._process.stdout is not None
        if (said := self._process.stdout.readline().strip()) != "stopped":
            self._process.communicate()
            raise NobodyError(said)

    def end(self) -> None:
        """Let the disk go on; returns when it does."""
        self._process.communicate()
