"""A pool of processes that runs a reward function, so that no reward can stall or break generation.

A plain function gets a process to itself while it runs. One that takes much longer than others do gives its place to
a further process meanwhile: a few that hang do not hold up those that don't. A coroutine function (which may wait for
a network) shares its process with others of its kind, and is cancelled after `--reward-timeout`. A process that does
not answer by then is killed and replaced, and the sample has failed; where several rewards shared it, each
is run again alone, so that only the one at fault fails.

pebble's `ProcessPool` runs one task at a time in a process, so coroutines cannot share one (16 that wait 0.5 s take 4 s
in two processes), and a late function keeps its place until its timeout. That is why this pool is our own.

The rollout process has one pool a reward function, at module level: generation functions have slime's signatures, which
hold no pool. `grade` and `grade_group` start it when they first need it.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import Self

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.rollout import Rewards
from rltrain.functions import explain, load_function
from rltrain.rewards.processes import Processes, WorkerProcess
from rltrain.rewards.rules import reward_function_path
from rltrain.rewards.worker import Grade, read_message, write_message
from rltrain.sample import Sample

_KILL_GRACE = 1.0  # seconds after the timeout in which a coroutine can still be cancelled
_COROUTINES_PER_WORKER = 64
# A reward is late after so many times what the last ones took, but not before so many seconds.
_LATE_FACTOR, _LATE_SECONDS = 10.0, 0.1
_MOST_LATE = 4  # late rewards for each worker that have a process beside it
_SMOOTHING = 0.05  # weight of the last reward in the mean


class RewardPool:
    """Runs one reward function in `--reward-num-workers` processes."""

    def __init__(self, config: Config, path: str, capacity: int, grace: float) -> None:
        """Use `start`."""
        self._config, self._path, self._capacity, self._grace = config, path, capacity, grace
        self._processes = Processes(config, path)
        self._workers = {
            _Worker(config.rewards, self._processes) for _ in range(config.rewards.reward_num_workers)
        }
        self._free: asyncio.Queue[_Worker] = asyncio.Queue()
        self._late: set[_Worker] = set()
        self._mean_seconds: float | None = None
        self._alone: RewardPool | None = None

    @classmethod
    async def start(cls, config: Config, path: str) -> Self:
        """Start the processes.

        Raises:
            UserError: the function can't be loaded.
        """
        is_coroutine = inspect.iscoroutinefunction(load_function(path, flag="--custom-rm-path"))
        pool = cls(config, path, *((_COROUTINES_PER_WORKER, _KILL_GRACE) if is_coroutine else (1, 0.0)))
        await pool._start()
        return pool

    async def grade(self, sample: Sample) -> Grade:
        """The sample's grade; what the reward function does wrong is in it and not raised."""
        return (await self._grade([sample], sample))[0]

    async def grade_group(self, samples: list[Sample]) -> list[Grade]:
        """The grades of samples that the reward function sees together; what it does wrong fails all of them."""
        return await self._grade(samples, samples)

    async def _grade(self, samples: list[Sample], subject: Sample | list[Sample]) -> list[Grade]:
        if self._capacity == 1:
            return await self._grade_plain(samples, subject)
        worker = await self._free.get()
        try:
            return await worker.grade(subject, self._config.rewards.reward_timeout + self._grace)
        except _NoAnswerError:
            pass
        finally:
            self._free.put_nowait(worker)
        if self._alone is None:
            self._alone = RewardPool(self._config, self._path, capacity=1, grace=self._grace)
            await self._alone._start()
        return await self._alone._grade(samples, subject)

    async def _grade_plain(self, samples: list[Sample], subject: Sample | list[Sample]) -> list[Grade]:
        worker = await self._free.get()
        late: asyncio.TimerHandle | None = None
        try:
            await worker.ensure_running()
            began = time.perf_counter()
            late = asyncio.get_running_loop().call_later(self._late_after(), self._replace, worker)
            grades = await worker.grade(subject, self._config.rewards.reward_timeout + self._grace)
            self._remember(time.perf_counter() - began)
            return grades
        except _NoAnswerError as error:
            return [Grade(None, str(error), time.perf_counter() - began) for _ in samples]
        finally:
            if late is not None:
                late.cancel()
            if worker in self._late:
                self._late.remove(worker)
                self._workers.remove(worker)
                await worker.stop()
            else:
                self._free.put_nowait(worker)

    def _late_after(self) -> float:
        """Seconds after which a reward is late; never before the first one of all is there."""
        if self._mean_seconds is None:
            return self._config.rewards.reward_timeout + self._grace
        return max(_LATE_SECONDS, _LATE_FACTOR * self._mean_seconds)

    def _remember(self, seconds: float) -> None:
        before = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = before + _SMOOTHING * (seconds - before)

    def _replace(self, worker: _Worker) -> None:
        """Put another in place of a worker whose reward is late."""
        if len(self._late) < _MOST_LATE * self._config.rewards.reward_num_workers:
            self._late.add(worker)
            other = _Worker(self._config.rewards, self._processes)
            self._workers.add(other)
            self._free.put_nowait(other)

    async def close(self) -> None:
        """End the processes."""
        for worker in list(self._workers):
            await worker.stop()
        await self._processes.close()
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

    def __init__(self, rewards: Rewards, processes: Processes) -> None:
        self._rewards, self._processes = rewards, processes
        self._process: WorkerProcess | None = None
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
        try:
            _send(self._writer, number, subject)
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            if self._process is process:  # else another reward has had it killed already
                await self.stop()
            raise _NoAnswerError(
                f"the reward took longer than --reward-timeout {self._rewards.reward_timeout:g} s"
            ) from None
        finally:
            pending.pop(number, None)

    async def ensure_running(self) -> None:
        async with self._starting:
            if self._process is None:
                await self._start()

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            reading = self._reading  # while this waits, the next process may be started
            await process.end()
            await reading

    async def _start(self) -> None:
        process = await self._processes.start()
        reader, self._writer = await asyncio.open_connection(sock=process.connection)
        self._process, self._pending = process, {}
        self._reading = asyncio.create_task(self._read(reader, self._writer, process, self._pending))

    async def _read(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        process: WorkerProcess,
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
            await process.end()


def _send(writer: asyncio.StreamWriter, number: int, subject: Sample | list[Sample]) -> None:
    try:
        write_message(writer, (number, subject))
    except Exception as error:  # of a sample that a user's function has filled
        raise _NoAnswerError(f"the sample can't be sent to the reward's process: {explain(error)}") from None


_pools: dict[tuple[str | None, ...], asyncio.Future[RewardPool]] = {}


async def grade(config: Config, sample: Sample) -> None:
    """Grade the sample in place: sets `reward`, or `status` FAILED and `failure`.

    Raises:
        UserError: no reward function was asked for, or it can't be loaded.
    """
    pool = await start(config, sample)
    _apply(sample, await pool.grade(sample))


async def grade_group(config: Config, samples: list[Sample]) -> None:
    """The same for the samples of one prompt together, with `--group-rm`."""
    if samples:
        pool = await start(config, samples[0])
        for sample, grade in zip(samples, await pool.grade_group(samples), strict=True):
            _apply(sample, grade)


def _apply(sample: Sample, grade: Grade) -> None:
    sample.reward, sample.reward_seconds = grade.reward, grade.seconds
    if grade.metadata is not None:
        sample.metadata = grade.metadata
    if grade.failure is not None:
        sample.status, sample.failure = Sample.Status.FAILED, grade.failure


def check(functions: Functions, rewards: Rewards) -> None:
    """Check that the reward that the flags ask for can be loaded.

    Raises:
        UserError: see `grade`.
    """
    load_function(reward_function_path(functions, rewards), flag="--custom-rm-path")


async def start(config: Config, sample: Sample | None = None) -> RewardPool:
    """The running pool for the reward that the flags, or the sample's metadata, ask for; started by the first call.

    Raises:
        UserError: see `grade`.
    """
    path = reward_function_path(config.functions, config.rewards, sample)
    key = (path, config.rewards.reward_key, config.rewards.rm_type)
    if key not in _pools:
        _pools[key] = asyncio.ensure_future(RewardPool.start(config, path))
    return await _pools[key]


async def close() -> None:
    """End all pools."""
    while _pools:
        _, pool = _pools.popitem()
        await (await pool).close()
