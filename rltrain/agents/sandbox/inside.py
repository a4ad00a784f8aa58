"""The first program in a sandbox: follows commands on its standard input, and answers through its output.

It runs commands under their limits, reads and writes files, and leaves no process behind after a command. The sandbox's
interpreter gets it as text through its standard input, and may be an older one: Python 3.8 must do.

A message is the length of a JSON header (4 bytes, big-endian), the header, and `size` bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = struct.Struct(">I")
_CHUNK = 1 << 16
_LOOK = 0.1  # seconds between two looks at memory and processes
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36


class Control:
    """The way to who gives the orders: copies of our standard input and output, which commands don't get."""

    def __init__(self) -> None:
        self._input, self._output = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

    def fileno(self) -> int:
        """The descriptor of the orders."""
        return self._input

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next order. Raises EOFError at the end of the input."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        header = json.loads(self._exactly(length))
        return header, self._exactly(header.get("size", 0))

    def send(self, header: dict[str, Any], content: bytes = b"") -> None:
        """An answer."""
        head = json.dumps({**header, "size": len(content)}).encode()
        data = memoryview(LENGTH.pack(len(head)) + head + content)
        while data:
            data = data[os.write(self._output, data) :]

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = os.read(self._input, min(count - len(data), 1 << 20))
            if not more:
                raise EOFError
            data += more
        return bytes(data)


class Family:
    """All processes that commands have started."""

    def __init__(self, alone: bool) -> None:
        """`alone`: this program has a PID namespace to itself, so that they are all others but the first."""
        self._alone = alone

    def pids(self) -> list[int]:
        """Their ids, without zombies."""
        parents = {}
        for name in os.listdir("/proc"):  # noqa: PTH208 -- a look must be quick
            if name.isdigit():
                try:
                    state, parent = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[:2]
                except (OSError, ValueError):  # it ended
                    continue
                parents[int(name)] = (int(parent), state)
        if self._alone:
            found = [pid for pid in parents if pid not in (1, os.getpid())]
        else:
            found, todo = [], [os.getpid()]
            while todo:
                one = todo.pop()
                below = [pid for pid, (parent, _) in parents.items() if parent == one]
                found += below
                todo += below
        return [pid for pid in found if parents[pid][1] not in b"ZX"]

    def kill(self) -> None:
        """End them all, also those that are being born."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = self.pids()
            if not left:
                break
            for pid in [-1] if self._alone else left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self.bury()
            time.sleep(0.005)
        self.bury()

    @staticmethod
    def bury() -> None:
        """Take note of those that ended, so that the kernel forgets them."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def problem(self, memory: int, processes: int) -> str:
        """The limit that is exceeded, or ""."""
        pids, pages = self.pids(), 0
        if len(pids) > processes:
            return f"more than {processes} processes"
        for pid in pids:
            try:
                words = Path(f"/proc/{pid}/statm").read_bytes().split()
                pages += int(words[1]) - int(words[2])  # without what is shared
            except (OSError, ValueError, IndexError):
                continue
        return f"more than {memory >> 20} MB of memory" if pages * _PAGE > memory else ""


def run(
    order: dict[str, Any], given: bytes, control: Control, family: Family
) -> tuple[dict[str, Any], bytes]:
    """Run a command to its end, or to the first limit that it meets."""
    began = time.monotonic()
    try:
        child = subprocess.Popen(
            order["command"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=order["env"],
            cwd=order["cwd"], start_new_session=True, close_fds=False, bufsize=0, preexec_fn=_limits(order),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return {
            "code": 127,
            "reason": f"it can't be started: {error}",
            "stdout": 0,
            "printed": 0,
            "seconds": 0,
        }, b""
    assert child.stdin and child.stdout and child.stderr
    kept = {child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    printed, reason, looked = 0, "", began
    with selectors.DefaultSelector() as ready:
        for pipe in (child.stdout, child.stderr):
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ)
        ready.register(control, selectors.EVENT_READ)
        os.set_blocking(child.stdin.fileno(), False)
        ready.register(child.stdin, selectors.EVENT_WRITE)
        while child.poll() is None and not reason:
            for key, _ in ready.select(0.02):
                if key.fileobj is control:
                    raise EOFError  # the answer is no longer awaited
                if key.fileobj is child.stdin:
                    given = _feed(ready, child.stdin, given)
                else:
                    printed += _keep(ready, key.fileobj, kept, order["output"])
            now = time.monotonic()
            if now - began > order["seconds"]:
                reason = "it took longer than {:g} s".format(order["seconds"])
            elif now - looked > _LOOK:
                looked, reason = now, family.problem(order["memory"], order["processes"])
    # Its exit code first: who buries all that ended would find it, too.
    code = child.poll()
    if code is None:
        child.kill()
        child.wait()
    family.kill()
    for pipe in (child.stdout, child.stderr):
        printed += _drain(pipe, kept[pipe.fileno()], order["output"])
    out, err = bytes(kept[child.stdout.fileno()]), bytes(kept[child.stderr.fileno()])
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()
    answer = {"code": None if reason else code, "reason": reason, "stdout": len(out), "printed": printed}
    return {**answer, "seconds": time.monotonic() - began}, out + err


def _limits(order: dict[str, Any]) -> Callable[[], None]:
    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, order["disk"]),
        (resource.RLIMIT_DATA, order["memory"]),
    ]
    if order["own_user"]:  # else all that the user runs on this machine would count
        wanted.append((resource.RLIMIT_NPROC, order["processes"] + 3))  # with us, and two of bubblewrap's

    def limit() -> None:
        for what, most in wanted:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))

    return limit


def _feed(ready: selectors.BaseSelector, pipe: Any, given: bytes) -> bytes:
    try:
        given = given[os.write(pipe.fileno(), given[:_CHUNK]) :] if given else b""
    except BlockingIOError:
        return given
    except OSError:  # it does not listen
        given = b""
    if not given:
        ready.unregister(pipe)
        pipe.close()
    return given


def _keep(ready: selectors.BaseSelector, pipe: Any, kept: dict[int, bytearray], most: int) -> int:
    try:
        data = os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return 0
    if not data:
        ready.unregister(pipe)
    tail = kept[pipe.fileno()]
    tail += data
    del tail[:-most]
    return len(data)


def _drain(pipe: Any, tail: bytearray, most: int) -> int:
    """The rest, of processes that are dead."""
    count = 0
    while True:
        try:
            data = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return count
        if not data:
            return count
        count += len(data)
        tail += data
        del tail[:-most]


def read(path: str, most: int) -> bytes:
    """A file. Raises OSError or ValueError: it is not a file, or too large."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return content


def write(path: str, content: bytes, mode: int) -> None:
    """A file, with the folders that it is in."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(mode)


def serve(control: Control, family: Family) -> None:
    """Follow orders until there are no more."""
    while True:
        order, content = control.receive()
        answer: dict[str, Any] = {}
        result = b""
        try:
            if order["do"] == "run":
                answer, result = run(order, content, control, family)
            elif order["do"] == "read":
                result = read(order["path"], order["most"])
            else:
                write(order["path"], content, order["mode"])
        except (OSError, ValueError) as error:
            answer = {"error": str(error)}
        control.send(answer, result)


def _stop(*_: Any) -> None:
    raise EOFError


def _become(user: int, folders: list[str]) -> None:
    """Another user, with the folders."""
    for folder in folders:
        os.chown(folder, user, user)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def main(settings: dict[str, Any]) -> None:
    """Settings: `alone`, `user`, `home`, `made` (a temporary folder, the home if there is no other), `outside` (the PID
    namespace there), `network` (a descriptor).
    """
    prctl = ctypes.CDLL(None).prctl
    if settings["alone"] and Path("/proc/self/ns/pid").stat().st_ino == settings["outside"]:
        sys.exit("the sandbox has no PID namespace of its own")
    control, family, home = Control(), Family(settings["alone"]), settings["home"]
    made: str | None = settings["made"]
    if not settings["alone"]:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, _stop)
    if home is None:
        home = made = made or tempfile.mkdtemp(prefix="slurmlime-agent-")
    try:
        if settings["user"] is not None:
            _become(settings["user"], [home, "/tmp", "/dev/shm"])
        os.chdir(home)
        port = 0
        if settings["network"] is not None:
            with socket.socket() as listener, socket.socket(fileno=settings["network"]) as channel:
                listener.bind(("127.0.0.1", 0))
                listener.listen(64)
                port = listener.getsockname()[1]
                socket.send_fds(channel, [b"."], [listener.fileno()])
        prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # commands run as the same user: they can't look into us
        control.send({"home": home, "port": port})
        serve(control, family)
    except (EOFError, ConnectionError):
        pass
    finally:
        family.kill()
        if made:
            shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
