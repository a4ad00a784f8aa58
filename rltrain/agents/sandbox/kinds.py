"""From the name of a kind of sandbox to how one is started on this machine, and whether it can be."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rltrain.agents.sandbox.commands import Launch, apptainer, bubblewrap, plain, pyxis
from rltrain.agents.sandbox.limits import Limits
from rltrain.run.errors import UserError

Kind = Literal["none", "bubblewrap", "apptainer", "pyxis"]
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt")
_LEAST_VERSION = (0, 8)  # the first with --disable-userns
_USERS = range(1 << 30, 1 << 31)  # nobody has them


def launch(kind: Kind, limits: Limits, readable: Iterable[str] = (), image: str | None = None) -> Launch:
    """How a sandbox is started on this machine.

    Args:
        kind: the program that makes it.
        limits: its sizes.
        readable: paths that it sees beside the system, read-only.
        image: that of Apptainer and pyxis.
    """
    if kind == "bubblewrap":
        paths, links = _system()
        python = os.path.realpath(sys.executable)
        # Without another user for each, the limit of processes would not act on root; nor would its files be safe.
        become = secrets.choice(_USERS) if os.geteuid() == 0 else None
        return bubblewrap(python, limits, [*paths, sys.base_prefix, *readable], links, become)
    if kind == "apptainer":
        return apptainer(image or "", readable)
    if kind == "pyxis":
        node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        return pyxis(image or "", readable, os.environ.get("SLURM_JOB_ID", ""), node)
    return plain(sys.executable)


def check(kind: Kind) -> None:
    """Check that this machine can start such a sandbox.

    Raises:
        UserError: what is missing, and who can help.
    """
    program = {"bubblewrap": "bwrap", "apptainer": "apptainer", "pyxis": "srun"}.get(kind)
    if program is None:
        return
    if shutil.which(program) is None:
        hint = " Debian's package is bubblewrap." if kind == "bubblewrap" else ""
        raise UserError(f"--agent-sandbox {kind}: {program} is not installed on this machine.{hint}")
    if kind == "bubblewrap":
        _check_bubblewrap()


def _check_bubblewrap() -> None:
    said = subprocess.run(
        ["bwrap", "--version"], capture_output=True, text=True, timeout=30, check=False
    ).stdout
    version = tuple(int(word) for word in re.findall(r"\d+", said)[:2])
    if version < _LEAST_VERSION:
        raise UserError(
            f"--agent-sandbox bubblewrap: {said.strip() or 'bwrap'} is too old: 0.8 or newer is needed."
        )
    tried = subprocess.run(
        [
            "bwrap",
            "--unshare-all",
            *([] if os.geteuid() == 0 else ["--unshare-user"]),
            "--ro-bind",
            "/",
            "/",
            "true",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if tried.returncode:
        raise UserError(explain_refusal(tried.stderr.strip()))


def explain_refusal(said: str) -> str:
    """What to do about bubblewrap's complaint."""
    switches = {
        "/proc/sys/user/max_user_namespaces": "0",
        "/proc/sys/kernel/unprivileged_userns_clone": "0",
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    off = [path for path, value in switches.items() if _content(path) == value]
    why = (
        f" User namespaces are off: {', '.join(f'{path} is {switches[path]}' for path in off)}."
        if off
        else ""
    )
    return (
        f"--agent-sandbox bubblewrap can't make a sandbox on this machine: {said or 'no reason given'}.{why} The"
        " machine's administrator can allow user namespaces; --agent-sandbox apptainer or pyxis may work as they are."
    )


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _system() -> tuple[list[str], list[tuple[str, str]]]:
    """Folders of the system, and those that are symbolic links."""
    there = [path for path in map(Path, _SYSTEM) if path.exists()]
    links = [(str(path.readlink()), str(path)) for path in there if path.is_symlink()]
    return [str(path) for path in there if not path.is_symlink()], links
