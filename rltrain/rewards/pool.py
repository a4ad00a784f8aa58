"""A pool of processes that runs a reward function, so that no reward can stall or break generation.

A plain function gets a process to itself while it runs. A coroutine function (which may wait for a network)
shares its process with others of its kind, and is cancelled after `--reward-timeout`. A process that does
not answer by then is killed and replaced, and the sample has failed; where several rewards shared it, each
is run again alone, so that only the one at fault fails.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import socket
import sys
import time
from typing import Self

from rltrain.arguments.errors import UserError
from rltrain.functions import load_function
from rltrain.rewards.worker import Grade, read_message, write_message
from rltrain.sample import Sample

_START_TIMEOUT = 120.0  # seconds: imports of a user's module can be slow
_KILL_GRACE = 1.0  # seconds after the timeout in which a coroutine can still be cancelled
_COROUTINES_PER_WORKER = 64


class RewardPool:
    """Runs one reward function in `--reward-num-workers` processes."""

    def __init__(self, args: argparse.Namespace, path: str, capacity: int, grace: float) -> None:
        """Use `start`."""
        self._args, self._path, self._capacity, self._grace = args, path, capacity, grace
        self._workers = [_Worker(args, path) for _ in range(args.reward_num_workers)]
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._alone: RewardPool | None = None

    @classmethod
    async def start(cls, args: argparse.Namespace, path: str) -> Self:
        """Start the processes.

        Raises:
            UserError: the function can't be loaded.
        """
        is_coroutine = inspect.iscoroutinefunction(load_function(path, flag="--custom-rm-path"))
        pool = cls(args, path, *((_COROUTINES_PER_WORKER, _KILL_GRACE) if is_coroutine else (1, 0.0)))
        await pool._start()
        return pool

    async def grade(self, sample: Sample) -> Grade:
        """The sample's grade; what the reward function does wrong is in it and not raised."""
        return (await self._grade([sample], sample))[0]

    async def grade_group(self, samples: list[Sample]) -> list[Grade]:
        """The grades of samples that the reward function sees together; what it does wrong fails all of them."""
        return await self._grade(samples, samples)

    async def _grade(self, samples: list[Sample], subject: Sample | list[Sample]) -> list[Grade]:
        worker = await self._free.get()
        began = time.perf_counter()
        try:
            return await worker.grade(subject, self._args.reward_timeout + self._grace)
        except _NoAnswerError as error:
            if self._capacity == 1:
                return [Grade(None, str(error), time.perf_counter() - began) for _ in samples]
        finally:
            self._free.put_nowait(worker)
        if self._alone is None:
            self._alone = RewardPool(self._args, self._path, capacity=1, grace=self._grace)
            await self._alone._start()
        return await self._alone._grade(samples, subject)

    async def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            await worker.stop()
        if self._alone is not None:
            await self._alone.close()

    async def _start(self) -> None:
        for _ in range(self._capacity):
            for worker in self._workers:
                self._free.put_nowait(worker)
        try:
            await asyncio.gather(*(worker.ensure_running() for worker in self._workers))
        except BaseException:
            await self.close()
            raise


class _NoAnswerError(Exception):
    """The process was killed, or died, before it answered; the message says which."""


class _Worker:
    """One process, and the rewards that it runs now. Started again after it died."""

    def __init__(self, args: argparse.Namespace, path: str) -> None:
        self._args, self._path = args, path
        self._process: asyncio.subprocess.Process | None = None
        self._pending: dict[
            int, asyncio.Future[list[Grade]]
        ] = {}  # of this process: the next one has its own
        self._count = 0
        self._starting = asyncio.Lock()

    async def grade(self, subject: Sample | list[Sample], timeout: float) -> list[Grade]:
        await self.ensure_running()
        self._count += 1
        number = self._count
        process, pending = self._process, self._pending
        future = pending[number] = asyncio.get_running_loop().create_future()
        write_message(self._writer, (number, subject))
        try:
            done, _ = await asyncio.wait([future], timeout=timeout)
        finally:
            pending.pop(number, None)
        if not done:
            if self._process is process:  # else another reward has had it killed already
                await self.stop()
            raise _NoAnswerError(
                f"the reward took longer than --reward-timeout {self._args.reward_timeout:g} s"
            )
        return future.result()

    async def ensure_running(self) -> None:
        async with self._starting:
            if self._process is None:
                await self._start()

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            reading = self._reading  # while this waits, the next process may be started
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reading

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "rltrain.rewards.worker",
                str(theirs.fileno()),
                str(os.getpid()),
                pass_fds=[theirs.fileno()],
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        write_message(writer, (self._args, self._path))
        try:
            problem = await asyncio.wait_for(read_message(reader), _START_TIMEOUT)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            problem = "a reward process did not start; its output is above."
        if problem is not None:
            if process.returncode is None:
                process.kill()
            raise UserError(problem)
        self._process, self._writer, self._pending = process, writer, {}
        self._reading = asyncio.create_task(self._read(reader, writer, process, self._pending))

    async def _read(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        process: asyncio.subprocess.Process,
        pending: dict[int, asyncio.Future[list[Grade]]],
    ) -> None:
        try:
            while True:
                number, grade = await read_message(reader)
                if number in pending and not pending[number].done():
                    pending[number].set_result(grade)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            if self._process is process:
                self._process = None
            for future in pending.values():
                if not future.done():
                    future.set_exception(_NoAnswerError("the reward function ended its process"))
