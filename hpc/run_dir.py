"""Make a run directory, or take up the one that is there."""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from hpc.eventlog import append_event, replace_text
from hpc.layout import RunLayout
from hpc.lock import hold_lock
from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags

_PACKAGES = (
    *("slurmlime", "torch", "megatron-core", "sglang", "sglang-router", "transformers"),
    *("submitit", "wandb", "pyarrow", "pandas", "numpy"),
)


def stored_flags(layout: RunLayout) -> Flags:
    """The flags that an existing run was last submitted with; none if there is no such run.

    Raises:
        UserError: the directory is there but is no run.
    """
    if not layout.root.exists():
        return {}
    if not layout.config.is_file():
        raise UserError(f"{layout.root} exists but is no run (it has no config.toml). Give another --name.")
    return flag_data.from_table(tomllib.loads(layout.config.read_text())["flags"], str(layout.config))


def is_finished(layout: RunLayout, args: argparse.Namespace) -> bool:
    """Whether an existing run has done all the steps that are now asked for."""
    try:
        status = json.loads(layout.status.read_text())
        done = tomllib.loads(layout.config.read_text())["train"]
    except FileNotFoundError:
        return False
    return status.get("phase") == "finished" and args.num_rollout <= done["num_rollout"]


def prepare(
    layout: RunLayout, args: argparse.Namespace, flags: Flags, submit: dict[str, Any] | None = None
) -> None:
    """Make the run directory (mode 0700), or write the new configuration into the one that is there.

    A new directory appears whole or not at all. `submit` holds the options that a later submission takes over.

    Raises:
        UserError: the run belongs to a job that is running, or its place can't be written.
    """
    config = {
        "flags": flag_data.to_table(_resolve_paths(flags, args)),
        "submit": submit or {},
        "train": arguments.dump(args),
    }
    if layout.root.exists():
        with hold_lock(layout):
            _write_config(layout, config)
            append_event(layout.events, _next_attempt(layout), "run_submitted", {"resumed": True})
        return
    try:
        _create(layout, config, run_identity(layout.name, args))
    except OSError as error:
        raise UserError(
            f"can't make the run directory {layout.root}: {error.strerror}: {error.filename}."
        ) from None


def _resolve_paths(flags: Flags, args: argparse.Namespace) -> Flags:
    """The flags with paths made absolute, as they are in `args`: the run may be resumed from elsewhere."""
    resolved = dict(flags)
    for name, values in flags.items():
        now = getattr(args, name.replace("-", "_"), None)
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


def run_identity(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `run.json` holds: made once, the same for every attempt."""
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wandb_run_id": args.wandb_run_id or secrets.token_hex(4),
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
