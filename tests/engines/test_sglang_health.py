"""When an engine is held for hung: against real processes that are stopped or end, and answers that fail to come."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from helpers.local_job import wait_until

from rltrain.run.http import call
from rltrain.sglang import health
from rltrain.sglang.health import HealthLimits, HungError, stopped_process, watch

LIMITS = HealthLimits(interval=0.01, timeout=0.1)


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child that somebody may stop."""
    process = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    for pid in (child, process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def count_down(number: int) -> Callable[[], bool]:
    """False so many times, then True."""
    left = iter(range(number))
    return lambda: next(left, None) is None


def test_an_engine_that_answers_is_left_alone(server: subprocess.Popen[bytes]) -> None:
    asked: list[float] = []
    watch(server.pid, lambda timeout: not asked.append(timeout), lambda: False, LIMITS, count_down(40))
    assert len(asked) > 5 and set(asked) == {LIMITS.timeout}


def test_an_engine_that_does_not_answer_is_hung(server: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    with pytest.raises(HungError, match="scheduler has not answered"):
        watch(server.pid, lambda _: False, lambda: False, LIMITS, lambda: False)
    assert time.monotonic() - began >= LIMITS.timeout


class Clock:
    """Goes by what is slept: on a busy machine a look may take longer than a time limit that a test can wait for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(health, "time", clock)
    return clock


def test_an_answer_in_between_starts_the_clock_anew(server: subprocess.Popen[bytes], clock: Clock) -> None:
    answers, limits = itertools.cycle([False, True]), HealthLimits(interval=0.01, timeout=0.2)
    watch(server.pid, lambda _: next(answers), lambda: False, limits, lambda: clock.now > 0.5)


def test_weights_give_more_time(server: subprocess.Popen[bytes], clock: Clock) -> None:
    limits = HealthLimits(interval=0.01, timeout=0.2)
    watch(server.pid, lambda _: False, lambda: True, limits, lambda: clock.now > 0.5)


def test_a_stopped_process_gets_no_more_time(server: subprocess.Popen[bytes]) -> None:
    child = int(subprocess.check_output(["pgrep", "-P", str(server.pid)]))
    os.kill(child, signal.SIGSTOP)
    wait_until(lambda: stopped_process(server.pid))
    with pytest.raises(HungError, match=f"sleep .pid {child}. has been stopped"):
        watch(server.pid, lambda _: True, lambda: True, LIMITS, lambda: False)
    os.kill(child, signal.SIGCONT)


def test_the_first_look_can_wait(server: subprocess.Popen[bytes]) -> None:
    limits = HealthLimits(interval=0.01, timeout=0.01, first_wait=60.0)
    watch(server.pid, lambda _: False, lambda: False, limits, count_down(20))


def test_an_engine_that_ends_is_not_hung(server: subprocess.Popen[bytes]) -> None:
    ended = count_down(1)
    watch(server.pid, lambda _: False, lambda: False, HealthLimits(0.01, 0.0), lambda: ended() or ended())


def test_a_server_that_ends_while_it_answers_is_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_half, args=(listener,))
        thread.start()
        with pytest.raises(ConnectionError, match="IncompleteRead"):
            call("GET", f"http://127.0.0.1:{listener.getsockname()[1]}/", "token")
        thread.join()


def answer_half(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
