"""The processes of a reward pool, forked from one that has loaded the reward function: a new one costs milliseconds.

Python can safely fork only a process with a single thread. A function whose module has started threads (as a model
would) gets processes that each load it again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from rltrain.arguments.config import Config
from rltrain.rewards.worker import LENGTH, NUMBER
from rltrain.run.errors import UserError

_TRIES = 2
_START_TIMEOUT = 120.0  # seconds: imports of a user's module can be slow
# Rewards run side by side already; threads of NumPy or torch would take each other's cores, and can't be forked.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerProcess:
    """One process that grades, and the socket to it."""

    def __init__(self, connection: socket.socket, end: Callable[[], Awaitable[None]]) -> None:
        """`end` kills it, if need be, and waits for it."""
        self.connection, self._end = connection, end
        self._ended: asyncio.Task[None] | None = None

    async def end(self) -> None:
        """Kill it, if it has not ended, and wait for it; may be called again."""
        self._ended = self._ended or asyncio.ensure_future(self._end())
        await asyncio.shield(self._ended)


class Processes:
    """Starts them, for one reward function."""

    def __init__(self, config: Config, path: str) -> None:
        """Start processes with `start`."""
        self._config, self._path = config, path
        self._forks = True  # until known better
        self._template: socket.socket | None = None  # to the one that the others are forked from
        self._template_process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> WorkerProcess:
        """A new process, ready to grade.

        Raises:
            UserError: the function can't be loaded.
        """
        async with self._turn:
            for _ in range(_TRIES if self._forks else 0):
                if self._template is None:
                    connection, process, self._forks = await self._launch()
                    if not self._forks:
                        return _worker(connection, process)
                    self._template, self._template_process = connection, process
                try:
                    return await self._fork()
                except ConnectionError:  # it has died, and those that it forked with it
                    await self._end_template()
        if self._forks:
            raise UserError("a reward process could not be forked; its output is above.")
        connection, process, _ = await self._launch()
        return _worker(connection, process)

    async def close(self) -> None:
        """End the process that the others are forked from, and thereby those."""
        async with self._turn:
            await self._end_template()

    async def _end_template(self) -> None:
        if self._template is not None and self._template_process is not None:
            self._template.close()
            self._template = None
            await _end(self._template_process)

    async def _fork(self) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            pid = await self._ask(0, theirs.fileno())

        template = self._template

        async def end() -> None:
            async with self._turn:
                if template is self._template is not None:
                    with suppress(ConnectionError):  # it has died, and those that it forked with it
                        await self._ask(pid)

        return WorkerProcess(ours, end)

    async def _ask(self, pid: int, *descriptors: int) -> int:
        """Have a process forked for a connection, or ended; returns its id."""
        assert self._template is not None
        socket.send_fds(self._template, [NUMBER.pack(pid)], list(descriptors))
        return NUMBER.unpack(await _receive(self._template, NUMBER.size))[0]

    async def _launch(self) -> tuple[socket.socket, asyncio.subprocess.Process, bool]:
        """A process that has loaded the function, and whether others can be forked from it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rltrain.rewards.worker",
                str(theirs.fileno()),
                str(os.getpid()),
                pass_fds=[theirs.fileno()],
                env={**_ONE_THREAD, **os.environ},
            )
        forks = False
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                args = argparse.Namespace(**_picklable(vars(self._config.namespace)))
                message = pickle.dumps((args, self._path), protocol=pickle.HIGHEST_PROTOCOL)
                await asyncio.get_running_loop().sock_sendall(ours, LENGTH.pack(len(message)) + message)
                (length,) = LENGTH.unpack(await _receive(ours, LENGTH.size))
                problem, forks = pickle.loads(await _receive(ours, length))
        except (TimeoutError, ConnectionError):
            problem = "a reward process did not start; its output is above."
        if problem is not None:
            ours.close()
            await _end(process)
            raise UserError(problem)
        return ours, process, forks


def _picklable(values: dict[str, Any]) -> dict[str, Any]:
    """The values without what a generation function has set and no other process can have: locks, clients, …."""

    def can_be_sent(value: Any) -> bool:
        try:
            pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception:  # whatever a user's object raises
            return False
        return True

    if can_be_sent(values):
        return values
    return {name: value for name, value in values.items() if can_be_sent(value)}


def _worker(connection: socket.socket, process: asyncio.subprocess.Process) -> WorkerProcess:
    return WorkerProcess(connection, lambda: _end(process))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


async def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: the other end closed before.
    """
    data = b""
    while len(data) < count:
        more: Any = await asyncio.get_running_loop().sock_recv(connection, count - len(data))
        if not more:
            raise ConnectionError("a reward process ended")
        data += more
    return data
