"""A place where faults of network and disk can be done: namespaces of our own, and a disk for the runs.

Both take root, and end with the process, however it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpc.sandbox.packages import find_program, search_path

_MOUNT_POINT = Path("/mnt")
_DISK_BYTES = 512 << 20
_MARK = "SLURMLIME_CHAOS_ALONE"


def is_isolated() -> bool:
    """Whether this process has namespaces of its own, from `isolate`."""
    return os.environ.get(_MARK) == "1"


def isolate(argv: Sequence[str]) -> None:
    """Become this command again in namespaces of its own; returns if that is done, or if it can't be."""
    if is_isolated() or not _may_isolate():
        return
    script = f'{find_program("ip")} link set lo up && exec "$@"'
    again = [sys.executable, "-m", "hpc.chaos", *argv]
    words = ["unshare", "--mount", "--net", "--", find_program("bash"), "-c", script, "chaos", *again]
    os.execve(find_program("unshare"), words, {**os.environ, _MARK: "1"})


def _may_isolate() -> bool:
    """Whether we may do what `hpc.sandbox.network` and `disk_for_runs` do: some containers let not even root."""
    if os.geteuid() != 0 or shutil.which("ip", path=search_path()) is None:
        return False
    wires = "ip link add name try type bridge && ip link add name a0 type veth"
    script = f"{wires} && losetup --find && test -d {_MOUNT_POINT}"
    tried = ["unshare", "--mount", "--net", "--", "bash", "-c", script]
    env = {**os.environ, "PATH": search_path()}
    return subprocess.run(tried, env=env, capture_output=True).returncode == 0


@contextmanager
def disk_for_runs(directory: Path) -> Iterator[Path]:
    """Where runs go: in a directory, and where we are isolated on a small disk of their own, which lies there.

    Nothing else sees that disk, wherever it is mounted. It is not below /tmp, where `hpc.submit` lets no run be whose
    nodes have addresses of their own.
    """
    if not is_isolated():
        yield directory / "runs"
        return
    image = directory / "disk"
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    _call("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    _call("mount", "-o", "loop", str(image), str(_MOUNT_POINT))
    try:
        yield _MOUNT_POINT / "runs"
    finally:
        _call("umount", "--lazy", str(_MOUNT_POINT))


def _call(*words: str) -> None:
    subprocess.run([find_program(words[0]), *words[1:]], check=True)
