"""Make a run directory, or take up the one that is there. Refuse a place that the nodes of a cluster would not see."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hpc.runs.lock import hold_lock
from hpc.slurm.cluster import ClusterFacts
from rltrain import arguments
from rltrain.arguments import flags as flag_data
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.arguments.groups.debug import Tracking
from rltrain.run.errors import UserError
from rltrain.run.files import append_event, replace_text, share
from rltrain.run.layout import RunLayout
from rltrain.run.toml_values import read_table

_PACKAGES = (
    *("slurmlime", "torch", "megatron-core", "sglang", "sglang-router", "transformers"),
    *("submitit", "wandb", "pyarrow", "pandas", "numpy"),
)
_LOCAL_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_LOCAL_TYPES = ("tmpfs", "ramfs", "devtmpfs")


def stored_flags(layout: RunLayout, advice: str = "") -> Flags:
    """The flags that an existing run was last submitted with; none if there is no such run.

    Args:
        layout: of the run.
        advice: what to do about a damaged configuration, a sentence after a space.

    Raises:
        UserError: the directory is there, but it is not a run, or its configuration is damaged.
    """
    if not layout.root.exists():
        return {}
    if not layout.config.is_file():
        raise UserError(
            f"{layout.root} exists but is not a run (it has no config.toml). Give another --name."
        )
    return flag_data.from_table(read_table(layout, "flags", advice), str(layout.config))


def prepare(
    layout: RunLayout,
    config: Config,
    flags: Flags,
    submit: dict[str, Any] | None = None,
    *,
    shared: bool = False,
) -> None:
    """Make the run directory (mode 0700), or write the new configuration into the one that is there.

    A new directory appears whole or not at all. `submit` holds the options that a later submission takes over; with
    `shared` the group may read it.

    Raises:
        UserError: the run belongs to a job that is running, or its place can't be written.
    """
    stored = {
        "flags": flag_data.to_table(_resolve_paths(flags, config)),
        "submit": submit or {},
        "train": arguments.dump(config),
    }
    if layout.root.exists():
        with hold_lock(layout):
            _write_config(layout, stored)
            append_event(layout.events, _next_attempt(layout), "run_submitted", {"resumed": True})
        if shared:
            share(layout.root)
        return
    try:
        _create(layout, stored, run_identity(layout.name, config.tracking))
        if shared:
            share(layout.root)
    except OSError as error:
        raise UserError(
            f"can't make the run directory {layout.root}: {error.strerror}: {error.filename}."
        ) from None


def _resolve_paths(flags: Flags, config: Config) -> Flags:
    """The flags with paths made absolute, as they are in `config`: the run may be resumed from elsewhere."""
    resolved, found = dict(flags), config.values()
    for name, values in flags.items():
        now = found.get(name.replace("-", "_"))
        words = [now] if isinstance(now, str) else now
        if values and isinstance(words, list) and any(str(word).startswith("/") for word in words):
            resolved[name] = [str(word) for word in words]
    return resolved


def _create(layout: RunLayout, config: dict[str, Any], identity: dict[str, Any]) -> None:
    layout.root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{layout.name}.", dir=layout.root.parent))  # mode 0700
    try:
        made = RunLayout(draft)
        made.run_json.write_text(json.dumps(identity, indent=2) + "\n")
        _write_config(made, config)
        append_event(made.events, 0, "run_submitted", {"resumed": False})
        draft.rename(layout.root)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_config(layout: RunLayout, config: dict[str, Any]) -> None:
    import tomli_w

    replace_text(layout.config, tomli_w.dumps(config))


def append_submission(layout: RunLayout, entry: Mapping[str, object]) -> None:
    """Add an entry to the run's `job.json`: `job_id`, `layout` (`local` on this machine), `submitted` (ISO 8601) …"""
    try:
        entries = json.loads(layout.job.read_text())
    except FileNotFoundError:
        entries = []
    replace_text(layout.job, json.dumps([*entries, entry], indent=2) + "\n")


def _next_attempt(layout: RunLayout) -> int:
    return max(layout.attempts(), default=-1) + 1


def run_identity(name: str, tracking: Tracking) -> dict[str, Any]:
    """The content of `run.json`: made once, the same for every attempt."""
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wandb_run_id": tracking.wandb_run_id or secrets.token_hex(4),
        "directory": str(Path.cwd()),
        "git_commit": git_commit(Path.cwd()),
        "python": sys.version.split()[0],
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter to a run and are installed."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_commit(directory: Path) -> str | None:
    """The commit that is checked out, with `-dirty` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def check_run_dir(path: Path, facts: ClusterFacts) -> None:
    """Refuse a run directory that can't work.

    Raises:
        UserError: it can't be written, only this machine has it, or sbatch can't say its name.
    """
    if set(str(path)) & set("%\\"):
        raise UserError(
            f"{path}: sbatch gives a special meaning to % and \\ in paths. Give another --runs-dir."
        )
    above = path
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: you may not write to {above}. Give another --runs-dir.")
    if is_one_machine(facts):
        return
    if place := local_place(path, Path("/proc/mounts").read_text()):
        raise UserError(
            f"{path}: {place} is this machine's own, so the nodes would not see the run. Give a --runs-dir on a file"
            " system that the whole cluster has, such as your home directory."
        )


def is_one_machine(facts: ClusterFacts) -> bool:
    """Whether all nodes are this machine, as in a sandbox."""
    own = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    return all(node.name in own or _is_loopback(node.address) for node in facts.nodes)


def local_place(path: Path, mounts: str) -> str | None:
    """The directory or file system type by which a path belongs to one machine only, or None.

    `mounts` is the text of `/proc/mounts`.
    """
    for place in _LOCAL_PLACES:
        if path.is_relative_to(place):
            return place
    kind = filesystem_type(path, mounts)
    return f"a {kind}" if kind in _LOCAL_TYPES else None


def filesystem_type(path: Path, mounts: str) -> str | None:
    """Type of the file system that a path is on, from the text of `/proc/mounts`."""
    found: tuple[int, str | None] = (-1, None)
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= found[0]:  # of two at one place the later is seen
            found = (len(point), kind)
    return found[1]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
