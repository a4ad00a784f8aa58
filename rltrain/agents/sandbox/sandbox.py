"""A sandbox from outside: start, run, read, write, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rltrain.agents.sandbox.commands import Launch
from rltrain.agents.sandbox.inside import LENGTH
from rltrain.agents.sandbox.limits import Ended, Limits, SandboxError
from rltrain.agents.sandbox.way_out import WayOut
from rltrain.run.processes import kill_descendants

_START = 120.0  # seconds: an image may have to be unpacked
_STOP = 3.0  # seconds for it to end by itself
_LATE = 15.0  # seconds after a command's time limit until the whole sandbox is given up
_FILES = 60.0  # seconds for a file
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_INSIDE = Path(__file__).with_name("inside.py").read_bytes()
_READ_INSIDE = f"""import os, sys
text = b""
while len(text) < {len(_INSIDE)}:
    text += os.read(0, {len(_INSIDE)} - len(text)) or sys.exit(1)
exec(text)"""


class Sandbox:
    """Runs commands, one at a time. Nothing of it is left once it has stopped: no process, no file, no mount."""

    def __init__(self, launch: Launch, limits: Limits, way_out: tuple[str, int] | None = None) -> None:
        """`way_out`: the host and port that it may reach; everything else only where its kind has no own network."""
        self._launch, self._limits, self._way_out = launch, limits, way_out
        self._process: Process | None = None
        self._complaints: asyncio.Task[bytes] | None = None
        self._forward: WayOut | None = None
        self._folder: str | None = None
        self.home = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port at which `way_out` is found inside."""
        assert self._way_out is not None
        return ("127.0.0.1", self._forward.port) if self._forward else self._way_out

    async def start(self) -> None:
        """Start it.

        Raises:
            SandboxError: it did not start; with what it said.
        """
        try:
            async with asyncio.timeout(_START):
                await self._start()
        except (OSError, EOFError, TimeoutError) as error:
            said = await self._give_up()
            raise SandboxError(
                f"the sandbox did not start: {said or error or type(error).__name__}"
            ) from None
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        if self._launch.our_files:  # the program inside removes it, but can't once it is stopped or killed
            self._folder = tempfile.mkdtemp(prefix="slurmlime-agent-")
        ours, theirs = socket.socketpair()
        channel, network = socket.socketpair() if self._launch.own_network and self._way_out else (None, None)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command(network),
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=PIPE,
                    env=_environment_outside(),
                    pass_fds=[network.fileno()] if network else [],
                    start_new_session=True,
                )
            assert self._process.stderr
            self._complaints = asyncio.create_task(_tail(self._process.stderr))
            self._answers, self._orders = await asyncio.open_connection(sock=ours)
            self._orders.write(_INSIDE)
            ready, _ = await self._answer()
            self.home = ready["home"]
            if channel is not None and self._way_out is not None:
                _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
                self._forward = WayOut(socket.socket(fileno=descriptors[0]), self._way_out, ready["port"])
        finally:
            for each in (channel, network):
                if each is not None:
                    each.close()

    def _command(self, network: socket.socket | None) -> list[str]:
        settings = {
            "alone": self._launch.alone,
            "user": self._launch.become,
            "home": self._launch.home,
            "made": self._folder,
            "outside": Path("/proc/self/ns/pid").stat().st_ino,
            "network": network.fileno() if network else None,
        }
        return [*self._launch.command, "-c", _READ_INSIDE, json.dumps(settings)]

    async def run(
        self,
        command: Sequence[str],
        *,
        seconds: float,
        given: bytes = b"",
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> Ended:
        """Run a command to its end, or for at most `seconds`; all processes that it started end with it.

        Args:
            command: its words; the first may be found by `PATH`.
            seconds: wall-clock limit.
            given: its standard input.
            environment: added to `PATH`, `HOME`, `TMPDIR` and `LANG`; nothing else of ours gets in.
            folder: where it runs, in place of the home.

        Raises:
            SandboxError: the sandbox itself ended.
        """
        path = _PATH if self._launch.home else os.environ.get("PATH", _PATH)
        temporary = "/tmp" if self._launch.home else self.home
        environment = {"PATH": path, "HOME": self.home, "TMPDIR": temporary, "LANG": "C.UTF-8"} | dict(
            environment or {}
        )
        order: dict[str, Any] = {
            "do": "run",
            "command": list(command),
            "env": environment,
            "cwd": folder or self.home,
        }
        order |= {"seconds": seconds, "output": self._limits.output, "own_user": self._launch.own_user}
        order |= {name: getattr(self._limits, name) for name in ("memory", "processes", "disk")}
        answer, content = await self._ask(order, given, seconds + _LATE)
        if "error" in answer:
            raise SandboxError(f"the command could not be run: {answer['error']}")
        out = answer["stdout"]
        return Ended(
            answer["code"],
            answer["reason"],
            content[:out],
            content[out:],
            answer["printed"],
            answer["seconds"],
        )

    async def read(self, path: str) -> bytes:
        """A file; the path may be relative to the home.

        Raises:
            FileNotFoundError: it can't be read, or is larger than the limit.
        """
        answer, content = await self._ask(
            {"do": "read", "path": path, "most": self._limits.file}, b"", _FILES
        )
        if "error" in answer:
            raise FileNotFoundError(answer["error"])
        return content

    async def write(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file, with the folders that it is in.

        Raises:
            SandboxError: it can't be written.
        """
        answer, _ = await self._ask({"do": "write", "path": path, "mode": mode}, content, _FILES)
        if "error" in answer:
            raise SandboxError(f"{path}: {answer['error']}")

    async def stop(self) -> None:
        """End it with everything in it; may be called again, and after a failed start."""
        await asyncio.shield(asyncio.ensure_future(self._give_up()))

    async def _ask(
        self, order: dict[str, Any], content: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        if self._process is None:
            raise SandboxError("the sandbox is not running")
        head = json.dumps({**order, "size": len(content)}).encode()
        try:
            async with asyncio.timeout(seconds):
                self._orders.write(LENGTH.pack(len(head)) + head + content)
                await self._orders.drain()
                return await self._answer()
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            said = await self._give_up()
            what = "gave no answer" if isinstance(error, TimeoutError) else "ended"
            raise SandboxError(f"the sandbox {what}{': ' + said if said else ''}") from None
        except BaseException:  # cancelled: what comes next would be the answer to this order
            await self.stop()
            raise

    async def _answer(self) -> tuple[dict[str, Any], bytes]:
        """Its next message. Bounded: it comes from within."""
        (length,) = LENGTH.unpack(await self._answers.readexactly(LENGTH.size))
        if length > 1 << 20:
            raise ValueError("an answer too long")
        header = json.loads(await self._answers.readexactly(length))
        if (
            not isinstance(header, dict)
            or not 0 <= header.get("size", -1) <= self._limits.file + 2 * self._limits.output
        ):
            raise ValueError("an answer too long")
        return header, await self._answers.readexactly(header["size"])

    async def _give_up(self) -> str:
        """End it, and return the last that it said by itself."""
        process, self._process = self._process, None
        try:
            return await self._end(process) if process is not None else ""
        finally:
            if self._folder is not None:
                await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _end(self, process: Process) -> str:
        if self._forward is not None:
            await self._forward.close()
        if hasattr(self, "_orders"):
            self._orders.close()  # at which it ends by itself
        try:
            async with asyncio.timeout(_STOP):
                await process.wait()
        except TimeoutError:
            await asyncio.to_thread(kill_descendants, process.pid)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._complaints is None:
            return ""
        done, _ = await asyncio.wait([self._complaints], timeout=1)
        self._complaints.cancel()
        return self._complaints.result().decode(errors="replace").strip() if done else ""


def _environment_outside() -> dict[str, str]:
    """What bubblewrap, Apptainer or srun need. Programs inside could read it: it has no secrets."""
    names = ("PATH", "HOME", "TMPDIR", "LANG")
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or name.startswith(("SLURM_", "APPTAINER_", "ENROOT_"))
    }


async def _tail(stream: asyncio.StreamReader, most: int = 2000) -> bytes:
    kept = b""
    while data := await stream.read(4096):
        kept = (kept + data)[-most:]
    return kept
