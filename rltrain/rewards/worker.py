"""One process of the reward pool: `python -m rltrain.rewards.worker FD PARENT_PID`.

FD is a socket to the pool. Messages are pickles behind their length (4 bytes, big endian). The first one is
`(args, path of the reward function)`, answered by `(problem, forks)`: None or the reason why it can't be loaded, and
whether this process only forks others that grade. If so, a 0 with a socket asks for one that serves this socket, and
any other number for the end of the process of this id; both are answered by the id.

A process that grades gets `(number, sample)`, or a list of samples to be graded together, answered by
`(number, list of Grade)` in any order: coroutine functions run side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import math
import os
import pickle
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.functions import explain, explain_fully, load_function
from rltrain.run.errors import UserError
from rltrain.run.processes import die_with_parent
from rltrain.sample import Sample

LENGTH = struct.Struct(">I")
NUMBER = struct.Struct(">I")  # of a process


@dataclass(frozen=True)
class Grade:
    """The result for one sample: its reward, or the reason for its absence."""

    reward: float | dict[str, Any] | None
    failure: str | None
    seconds: float
    metadata: dict[str, Any] | None = None  # the sample's, where the reward function changed it


@dataclass(frozen=True)
class Grader:
    """A reward function, and slime's `args` for it."""

    function: Callable[..., Any]
    args: argparse.Namespace

    async def grade(self, sample: Sample) -> Grade:
        """Run the function on a sample; whatever goes wrong becomes the grade's `failure`."""
        return (await self._run(sample, [sample], lambda reward: [checked(reward, self.args.reward_key)]))[0]

    async def grade_group(self, samples: list[Sample]) -> list[Grade]:
        """The same for samples that the function sees together: it returns one reward for each, in a list."""

        def check(rewards: Any) -> list[Any]:
            if not isinstance(rewards, list | tuple) or len(rewards) != len(samples):
                raise ValueError(
                    f"the reward is {rewards!r}; expected a list of {len(samples)}, one per sample"
                )
            return [checked(reward, self.args.reward_key) for reward in rewards]

        return await self._run(samples, samples, check)

    async def _run(
        self, subject: Sample | list[Sample], samples: list[Sample], check: Callable[[Any], list[Any]]
    ) -> list[Grade]:
        before = [pickle.dumps(sample.metadata) for sample in samples]
        timeout, began = self.args.reward_timeout, time.perf_counter()
        try:
            reward = self.function(self.args, subject)
            if inspect.isawaitable(reward):
                reward = await asyncio.wait_for(reward, timeout)
        except Exception as error:
            seconds = time.perf_counter() - began
            failure = explain_fully(error)
            if isinstance(error, TimeoutError) and seconds >= timeout:
                failure = f"the reward took longer than --reward-timeout {timeout:g} s"
            return [Grade(None, failure, seconds) for _ in samples]
        seconds = time.perf_counter() - began
        try:
            rewards = check(reward)
        except Exception as error:
            return [Grade(None, f"{_name(self.function)}: {error}", seconds) for _ in samples]
        return [
            Grade(reward, None, seconds, _changed(sample, old))
            for reward, sample, old in zip(rewards, samples, before, strict=True)
        ]


def main() -> None:
    """Serve the pool on the other end of the socket until it closes."""
    die_with_parent(int(sys.argv[2]))
    connection: socket.socket | None = socket.socket(fileno=int(sys.argv[1]))
    assert connection is not None
    with connection.makefile("rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        args, path = pickle.loads(file.read(length))
    try:
        function = load_function(path, flag="--custom-rm-path")
    except UserError as error:
        _send(connection, (str(error), False))
        return
    forks = _has_one_thread()
    _send(connection, (None, forks))
    if forks:
        connection = fork_workers(connection)
    if connection is not None:
        asyncio.run(_serve(connection, Grader(function, args)))


def fork_workers(control: socket.socket) -> socket.socket | None:
    """Fork until `control` closes; returns None then, and in each process that was forked the socket to serve."""
    template = os.getpid()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, NUMBER.size, 1)
        if not data:
            return None
        (pid,) = NUMBER.unpack(data)
        if descriptors:
            connection = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                die_with_parent(template)
                control.close()
                return connection
            connection.close()
        else:
            os.kill(pid, signal.SIGKILL)  # not waited for yet, so the id can't be another's
            os.waitpid(pid, 0)
        control.sendall(NUMBER.pack(pid))


def _has_one_thread() -> bool:
    try:
        return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208
    except OSError:
        return False


async def _serve(connection: socket.socket, grader: Grader) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            number, subject = await read_message(reader)
            if inspect.iscoroutinefunction(grader.function):
                task = asyncio.create_task(_answer(writer, number, grader, subject))
                running.add(task)
                task.add_done_callback(running.discard)
            else:
                await _answer(writer, number, grader, subject)
    except (asyncio.IncompleteReadError, ConnectionError):
        return  # the pool is gone


async def _answer(
    writer: asyncio.StreamWriter, number: int, grader: Grader, subject: Sample | list[Sample]
) -> None:
    answer = await grader.grade_group(subject) if isinstance(subject, list) else [await grader.grade(subject)]
    try:
        write_message(writer, (number, answer))
    except (
        Exception
    ) as error:  # what a function returned, or left in the metadata, can't be sent to another process
        failure = (
            f"the reward function's result or the metadata that it set can't be pickled: {explain(error)}"
        )
        write_message(writer, (number, [Grade(None, failure, grade.seconds) for grade in answer]))


def _name(function: Callable[..., Any]) -> str:
    """Who returned something that is not a reward, for people: its import path and where it stands."""
    path = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{path} ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else path


def _changed(sample: Sample, old: bytes) -> dict[str, Any] | None:
    """The sample's metadata if the function has changed it. What can't be pickled is not as it was."""
    try:
        return None if pickle.dumps(sample.metadata) == old else sample.metadata
    except Exception:
        return sample.metadata


def checked(reward: Any, reward_key: str | None) -> float | dict[str, Any]:
    """The reward as a float (also of a text such as "1.0"), or a dict: with one under `reward_key`, or as it is.

    Raises:
        ValueError: it is neither of them, or the number is not finite.
    """
    value = reward
    if reward_key:
        if not isinstance(reward, dict) or reward_key not in reward:
            raise ValueError(
                f"the reward is {reward!r}; expected a dict with the --reward-key {reward_key!r}"
            )
        value = reward[reward_key]
    elif isinstance(reward, dict):
        return reward  # --custom-reward-post-process-path may make a number of it
    try:
        number = float(value)
    except Exception:  # of a tensor with several elements, or of a user's class
        raise ValueError(f"the reward is {value!r:.200}; expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"the reward is {number}; expected a finite number")
    return {**reward, reward_key: number} if reward_key else number


async def read_message(reader: asyncio.StreamReader) -> Any:
    """The next message; `asyncio.IncompleteReadError` at the end."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def write_message(writer: asyncio.StreamWriter, message: Any) -> None:
    """Send a message; not waited for."""
    writer.write(_packed(message))


def _send(connection: socket.socket, message: Any) -> None:
    connection.sendall(_packed(message))


def _packed(message: Any) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


if __name__ == "__main__":
    # Under this name, so that the pool can unpickle what it gets from here.
    from rltrain.rewards import worker

    worker.main()
