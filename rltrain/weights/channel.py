"""The channel between the trainer and the ranks of one engine during a push: says what is in a bucket, hears of it.

The ranks call the trainer, from within one request to the engine (`rltrain.weights.receive`). So a bucket costs a
message and not a request, which would take the engine some milliseconds. The weights themselves go another way
(`rltrain.weights.sources`).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor

from rltrain.run.processes import family_of
from rltrain.weights import LOADER

Request = Callable[[Sequence[str], str], object]  # payloads, loader

LOADED = "loaded"  # the report of a rank that has loaded a round; any other report says what went wrong

_POLL_SECONDS = 0.2
_MOST_SECONDS = 1800.0  # for a round; an engine that dies or hangs is noticed by its role, which ends it
_LENGTH_BYTES = 8
_HELLO_SECONDS = (
    120.0  # for a caller to identify itself: a rank may be stopped for a while, and others do not wait
)
_HELLO_BYTES = 1024


class Channel:
    """Open for the length of one request, in which the engine does nothing but load weights.

    Attributes:
        opened: when, by the monotonic clock.
        pending: number of messages that the engine has not reported on yet.
    """

    def __init__(self, request: Request, host: str, ahead: bool, name: str, size: int) -> None:
        """Have the engine's ranks call us at this machine's address `host`.

        Args:
            request: to the engine, which gives each rank its payload.
            host: of this machine, as the engine reaches it.
            ahead: whether it receives the next bucket while it loads the one before.
            name: what its ranks are told that it is called.
            size: number of its ranks.

        Raises:
            OSError, HttpError: they do not call: the engine has died or refuses.
        """
        self.opened, self.pending = time.monotonic(), 0
        self._ranks: list[socket.socket] = []
        key = secrets.token_hex()
        self._pool = ThreadPoolExecutor(1)
        with socket.create_server((host, 0), family=family_of(host), backlog=size) as server:
            port = server.getsockname()[1]
            call = {"host": host, "port": port, "key": key, "ahead": ahead, "engine": name, "size": size}
            calls = [_payload(call | {"rank": rank}) for rank in range(size)]
            self._request: Future[object] = self._pool.submit(request, calls, LOADER)
            try:
                self._ranks = self._accept(server, size, key)
            except BaseException:
                self.drop()
                raise

    def send(self, text: str) -> None:
        """Send all ranks a message.

        Raises:
            OSError: the engine has died.
        """
        self.pending += 1
        data = _framed(text)
        with _heard():
            for rank in self._ranks:
                rank.sendall(data)

    def receive_reports(self) -> list[str]:
        """The next report of each rank.

        Raises:
            OSError: the engine has died.
        """
        with _heard():
            reports = [receive_message(rank) for rank in self._ranks]
            if None in reports:
                raise ConnectionError
        self.pending -= 1
        return [str(report) for report in reports]

    def close(self) -> None:
        """Let the request come to its end, and wait for it.

        Raises:
            OSError, HttpError: it fails.
        """
        for rank in self._ranks:
            rank.shutdown(socket.SHUT_WR)
        self._request.result()
        self.drop()

    def drop(self) -> None:
        """Hang up, whatever the engine does."""
        for rank in self._ranks:
            rank.close()
        self._pool.shutdown(wait=False)

    def _accept(self, server: socket.socket, size: int, key: str) -> list[socket.socket]:
        """The calls of all ranks, in their order; strangers are rejected without waiting for their message."""
        ranks: dict[int, socket.socket] = {}
        callers: dict[socket.socket, _Caller] = {}
        server.setblocking(False)
        with selectors.DefaultSelector() as lines:
            lines.register(server, selectors.EVENT_READ)
            try:
                while len(ranks) < size:
                    if self._request.done():
                        self._request.result()  # raises, if it says why
                        raise ConnectionError(
                            "the engine's ranks have not connected: they can't reach the trainer"
                        )
                    ready = {selected.fileobj for selected, _ in lines.select(_POLL_SECONDS)}
                    for line, caller in [*callers.items()]:
                        hello = caller.listen(key) if line in ready else None
                        if hello is not None or caller.is_stranger():
                            lines.unregister(line)
                            del callers[line]
                        if hello is not None:
                            line.settimeout(_MOST_SECONDS)
                            ranks[hello] = line
                        elif line not in callers:
                            line.close()
                    if server in ready:
                        with contextlib.suppress(BlockingIOError, ConnectionError):  # it is gone again
                            line, _ = server.accept()
                            callers[line] = _Caller(line)
                            lines.register(line, selectors.EVENT_READ)
            finally:
                for line in callers:
                    line.close()
        return [ranks[rank] for rank in range(size)]


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Says what a broken connection means."""
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError("the engine closed the connection while it loaded weights") from error


class _Caller:
    """Somebody who has called, and has not said yet who it is."""

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._line, self._said, self._until = line, b"", time.monotonic() + _HELLO_SECONDS

    def listen(self, key: str) -> int | None:
        """Hear what there is to hear; returns its rank once it has said that, with the key."""
        try:
            more = self._line.recv(_HELLO_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            more = b""
        self._said += more
        length = int.from_bytes(self._said[:_LENGTH_BYTES], "little")
        if not more or len(self._said) > _HELLO_BYTES or length > _HELLO_BYTES:
            self._until = 0.0
        elif len(self._said) >= _LENGTH_BYTES + length:
            self._until = 0.0  # unless it has the key
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                hello = json.loads(self._said[_LENGTH_BYTES:])
                if hmac.compare_digest(hello.get("key").encode(), key.encode()):
                    return int(hello["rank"])
        return None

    def is_stranger(self) -> bool:
        """Whether it has said something else, or nothing for too long."""
        return time.monotonic() > self._until


def call_trainer(host: str, port: int, key: str, rank: int) -> socket.socket:
    """The other end, for a rank of the engine."""
    trainer = socket.create_connection((host, port))
    trainer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    send_message(trainer, json.dumps({"key": key, "rank": rank}))
    return trainer


def send_message(peer: socket.socket, text: str) -> None:
    """Send one message to the other end."""
    peer.sendall(_framed(text))


def receive_message(peer: socket.socket) -> str | None:
    """The next message; None when the other end has hung up."""
    length = _receive(peer, _LENGTH_BYTES)
    if length is None:
        return None
    data = _receive(peer, int.from_bytes(length, "little"))
    return None if data is None else data.decode()


def _framed(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def _receive(peer: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            return None
        data += more
    return bytes(data)


def _payload(call: dict[str, Any]) -> str:
    # SGLang wants pairs of a name and a tensor, pickled as between processes: the plain way names a function of torch
    # that megatron-core (0.17 and later) replaces, and SGLang refuses to call functions that it does not know.
    return b64encode(ForkingPickler.dumps([(json.dumps(call), Tensor())])).decode()
