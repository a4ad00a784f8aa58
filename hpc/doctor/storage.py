"""Can the run directory be made where it is wanted, is there room, and do other machines see it?"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hpc import shared_dir
from hpc.doctor.check import Check, fail, ok, warn

# Another machine sees what lies on them only if this one exports it.
_OWN_DISKS = ("overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
_LITTLE = 10 * 1024**3  # bytes


def check_storage(runs_dir: Path, others: bool, needed: float = 0.0) -> list[Check]:
    """Checks of the directory that will hold the runs.

    Args:
        runs_dir: need not exist yet.
        others: whether other machines than this one must see it.
        needed: bytes that the run's checkpoints will take, as far as they are known.
    """
    existing = nearest_existing(runs_dir)
    if problem := _problem_of_writing(existing):
        return [fail("run directory", f"{existing} can't be written: {problem}", "give another --runs-dir")]
    checks = [_check_space(existing, needed)]
    if others:
        checks.append(check_shared(runs_dir, Path("/proc/mounts").read_text()))
    return checks


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def _problem_of_writing(directory: Path) -> str | None:
    try:
        # Not os.access: quotas, read-only mounts and NFS's root squash are only found out by writing.
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _check_space(directory: Path, needed: float) -> Check:
    free = shutil.disk_usage(directory).free
    text = f"{directory} can be written, {free / 1024**3:.0f} GiB are free"
    if free < needed:
        return fail(
            "run directory", f"{text}; one checkpoint takes {needed / 1024**3:.0f} GiB", "another --runs-dir"
        )
    if free < max(_LITTLE, 3 * needed):
        return warn(
            "run directory", f"{text}, which is little", "checkpoints and rollouts grow: another --runs-dir"
        )
    return ok("run directory", text)


def check_shared(path: Path, mounts: str) -> Check:
    """Whether other machines see a directory; `mounts` is the text of /proc/mounts."""
    advice = "give a --runs-dir on the cluster's shared file system"
    if place := shared_dir.local_place(path, mounts):
        return fail("shared directory", f"{path}: {place} is a machine's own", advice)
    kind = shared_dir.filesystem_type(path, mounts)
    if kind in _OWN_DISKS:
        text = f"{path} is on {kind}, which other nodes see only if this machine exports it"
        return warn("shared directory", text, f"{advice}, or try it: --probe-nodes")
    return ok("shared directory", f"{path} is on {kind or 'a file system'} that nodes can share")
