"""A place where faults of network and disk can be done: namespaces of our own, and a disk for the runs.

Both take root, and end with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpc.chaos.faults import NobodyError
from hpc.sandbox.packages import find_program, search_path

PREFIX = "slurmlime-chaos-"  # of the directory of a storm
_MOUNT_POINTS = ("/mnt", "/media", "/srv")  # the first that is empty: we may run from what is in another
_DISK_BYTES = 512 << 20
_MARK = "SLURMLIME_CHAOS_ALONE"
_TRY = """\
ip link add name try type bridge
ip link add name a0 type veth
mkfs.ext4 -q -F {disk}
mount -o loop {disk} {mount_point}
chattr +i {mount_point}
chattr -i {mount_point}
"""

# It ends when its input does, so that the disk goes on however we end. The pauses make a slow disk of one that stops.
_STOPPER = "slurmlime-stops"  # its name
_STOPS = """\
trap '' PIPE TERM HUP INT
"$1" --freeze "$2" || exit
trap '"$1" --unfreeze "$2" 2>/dev/null' EXIT
echo stopped || exit
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


def is_isolated() -> bool:
    """Whether this process has namespaces of its own, from `isolate`."""
    return os.environ.get(_MARK) == "1"


def isolate(words: Sequence[str]) -> None:
    """Become `python WORDS` in namespaces of its own; returns if that is done, or if it can't be."""
    if is_isolated() or not _may_isolate():
        return
    thaw_left_disks()
    script = f'{find_program("ip")} link set lo up && exec "$@"'
    again = [sys.executable, *words]
    words = ["unshare", "--mount", "--net", "--", find_program("bash"), "-c", script, "chaos", *again]
    os.execve(find_program("unshare"), words, {**os.environ, _MARK: "1"})


def _may_isolate() -> bool:
    """Whether we may do what `hpc.sandbox.network` and `disk_for_runs` do: some containers let not even root."""
    mount_point = _mount_point()
    if os.geteuid() != 0 or mount_point is None:
        return False
    env = {**os.environ, "PATH": search_path()}
    with tempfile.NamedTemporaryFile() as image:
        image.truncate(16 << 20)
        script = _TRY.format(disk=shlex.quote(image.name), mount_point=mount_point)
        tried = ["unshare", "--mount", "--net", "--", "bash", "-ec", script]
        return subprocess.run(tried, env=env, capture_output=True).returncode == 0


def _mount_point() -> Path | None:
    return next(
        (path for path in map(Path, _MOUNT_POINTS) if path.is_dir() and not any(path.iterdir())), None
    )


@contextmanager
def disk_for_runs(directory: Path) -> Iterator[Path]:
    """Where runs go: in a directory, and where we are isolated on a small disk of their own, which lies there.

    Nothing else sees that disk, wherever it is mounted. It is not below /tmp, where `hpc.submit` lets no run be whose
    nodes have addresses of their own.
    """
    if not is_isolated():
        yield directory / "runs"
        return
    image, mount_point = directory / "disk", _mount_point()
    assert mount_point is not None
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    _call("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    _call("mount", "-o", "loop", str(image), str(mount_point))
    try:
        yield mount_point / "runs"
    finally:
        _call("umount", "--lazy", str(mount_point))


def _call(*words: str) -> None:
    subprocess.run([find_program(words[0]), *words[1:]], check=True)


def thaw_left_disks() -> None:
    """Let the disks of earlier storms go on that were killed together with what would have done so.

    Else processes that wait for such a disk would do so until the machine is started again: nothing can kill them.
    """
    namespaces: dict[str, Path] = {}
    tended: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            namespace = str((process / "ns/mnt").readlink())
            namespaces[namespace] = process
            if (process / "cmdline").read_bytes().split(b"\0")[3:4] == [_STOPPER.encode()]:
                tended.add(namespace)
    for namespace in namespaces.keys() - tended:
        for disk in _disks_of_storms(namespaces[namespace]):
            subprocess.run([find_program("fsfreeze"), "--unfreeze", str(disk)], capture_output=True)


def _disks_of_storms(process: Path) -> Iterator[Path]:
    """Where this process of /proc sees disks of storms, as we see them through it."""
    with contextlib.suppress(OSError):
        for line in (process / "mounts").read_text().splitlines():
            device, place, *_ = line.split()
            image = Path("/sys/block", Path(device).name, "loop/backing_file")
            if device.startswith("/dev/loop") and f"/{PREFIX}" in image.read_text():
                yield process / "root" / place.lstrip("/")


class Stops:
    """A disk stops, from now until `end`: there are no errors, but writers wait, and can't even be killed.

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
            [find_program("bash"), "-c", _STOPS, _STOPPER, *words],
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
