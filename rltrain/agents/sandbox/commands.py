"""The command line of each kind of sandbox. Pure.

A command starts the interpreter that runs `inside.py`; what follows it (`-c`, the program, its settings) is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from rltrain.agents.sandbox.limits import Limits

HOME = "/home/agent"
_SHARED_MEMORY = 64 << 20  # bytes of /dev/shm


@dataclass(frozen=True)
class Launch:
    """How a sandbox is started, and what it has of its own.

    Attributes:
        command: up to the interpreter inside.
        alone: it has a PID namespace to itself.
        own_network: it has a network of its own, without a way out.
        own_user: processes of others don't count against its limit.
        become: the user id that it takes; None: that of who starts it.
        home: its home; None: a temporary folder, removed at its end.
        our_files: it has no files of its own: that folder is one of this machine's.
    """

    command: tuple[str, ...]
    alone: bool = False
    own_network: bool = False
    own_user: bool = False
    become: int | None = None
    home: str | None = None
    our_files: bool = False


def plain(python: str) -> Launch:
    """Processes of this user in a temporary folder: for trusted code. Time, memory and processes are watched."""
    return Launch((python, "-I", "-S"), our_files=True)


def bubblewrap(
    python: str, limits: Limits, readable: Iterable[str], links: Iterable[tuple[str, str]], become: int | None
) -> Launch:
    """bubblewrap: namespaces of its own, a read-only system, a private home and /tmp of limited size.

    Args:
        python: interpreter of ours, which lies in one of `readable`.
        limits: sizes of the file systems.
        readable: paths that the sandbox sees, read-only.
        links: symbolic links of the system, as (target, path).
        become: root starts it, and it becomes this user. Without root it has a user namespace.
    """
    size = ("--size", str(limits.disk))
    command = [
        "bwrap",
        "--die-with-parent",
        "--new-session",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
    ]
    command += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox", "--clearenv"]
    if become is None:
        command += ["--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
    command += [
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--size",
        str(min(limits.disk, _SHARED_MEMORY)),
        "--tmpfs",
        "/dev/shm",
    ]
    command += ["--remount-ro", "/dev", *size, "--tmpfs", "/tmp", *size, "--tmpfs", HOME]
    for target, path in links:
        command += ["--symlink", target, path]
    paths = outermost(readable)
    for folder in sorted(
        {str(each) for path in paths for each in PurePosixPath(path).parents} - {"/", "/tmp"}
    ):
        command += ["--perms", "0755", "--dir", folder]  # else only who starts bubblewrap could enter it
    for path in paths:
        command += ["--ro-bind", path, path]
    command += ["--remount-ro", "/", "--chdir", HOME, "--", python, "-I", "-S"]
    return Launch(tuple(command), alone=True, own_network=True, own_user=True, become=become, home=HOME)


def apptainer(image: str, readable: Iterable[str]) -> Launch:
    """Apptainer: the image, read-only, with a /tmp of its own in memory, as large as the site's configuration says.

    The network is the machine's.
    """
    binds = [word for path in outermost(readable) for word in ("--bind", f"{path}:{path}:ro")]
    command = [
        "apptainer",
        "--silent",
        "exec",
        "--containall",
        "--no-home",
        "--no-privs",
        *binds,
        "--pwd",
        "/tmp",
    ]
    return Launch((*command, image, "python3", "-I", "-S"), alone=True)


def pyxis(image: str, readable: Iterable[str], job: str, node: str) -> Launch:
    """A step of this job on `node`, in a container of pyxis. Slurm ends it with the job; the network is the node's."""
    mounts = ",".join(f"{path}:{path}:ro" for path in outermost(readable))
    command = [
        "srun",
        f"--jobid={job}",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--input=0",
    ]
    command += [
        "--unbuffered",
        "--quiet",
        "--export=NONE",
        "--kill-on-bad-exit=1",
        f"--container-image={image}",
    ]
    command += ["--no-container-mount-home", "--container-writable", "--no-container-remap-root"]
    if mounts:
        command.append(f"--container-mounts={mounts}")
    return Launch((*command, "python3", "-I", "-S"))


def outermost(paths: Iterable[str]) -> list[str]:
    """Sorted, without those that lie in another one."""
    kept: list[str] = []
    for path in sorted({str(PurePosixPath(path)) for path in paths}):
        if not any(PurePosixPath(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept
