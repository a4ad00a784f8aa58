"""Where the run is recorded: its directory (writable, large enough, shared), and Weights & Biases (a key)."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hpc.doctor.check import Check, fail, ok, warn
from hpc.submitting.run_dir import filesystem_type, local_place
from rltrain.arguments.groups.debug import Tracking

# Other machines see these only if this one exports them.
_OWN_DISKS = ("overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
_LITTLE = 10 * 1024**3  # bytes
_HOST = "api.wandb.ai"


def check_storage(runs_dir: Path, others: bool, needed: float = 0.0) -> list[Check]:
    """Checks of the directory that will hold the runs.

    Args:
        runs_dir: need not exist yet.
        others: whether other machines than this one must see it.
        needed: bytes that the run's checkpoints will take, as far as they are known.
    """
    existing = nearest_existing(runs_dir)
    places = (runs_dir.absolute(), *runs_dir.absolute().parents)
    if file := next((each for each in places if each.is_file()), None):
        return [
            fail("run directory", f"{file} is a file where a directory is needed", "give another --runs-dir")
        ]
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
    if place := local_place(path, mounts):
        return fail("shared directory", f"{path}: {place} is local to one machine", advice)
    kind = filesystem_type(path, mounts)
    if kind in _OWN_DISKS:
        text = f"{path} is on {kind}, which other nodes can see only if this machine exports it"
        return warn("shared directory", text, f"{advice}, or try it: --probe-nodes")
    return ok("shared directory", f"{path} is on {kind or 'a file system'} that nodes can share")


def check_tracking(tracking: Tracking, env: Mapping[str, str], netrc: Path) -> Check:
    """Check what `--use-wandb` and its like need; `netrc` is where `wandb login` leaves the key."""
    mode = tracking.mode_of_wandb(env)
    if mode != "online":
        return ok("W&B", f"mode {mode}: no key is needed")
    if env.get("WANDB_API_KEY"):
        return ok("W&B", "online, with the key of WANDB_API_KEY")
    host = env.get("WANDB_BASE_URL", f"https://{_HOST}").partition("://")[2].partition("/")[0]
    try:
        known = f"machine {host}" in netrc.read_text()
    except OSError:
        known = False
    if not known:
        return fail("W&B", f"online, but there is no key for {host}", "wandb login, or --wandb-mode offline")
    if stat.S_IMODE(netrc.stat().st_mode) & 0o077:
        return warn("W&B", f"online, but others can read the key in {netrc}", f"chmod 600 {netrc}")
    return ok("W&B", f"online, with the key in {netrc}")
