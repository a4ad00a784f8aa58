"""The channel between the trainer and the ranks of one engine during a push: says what is in a bucket, hears of it.

The ranks call the trainer, from within one request to the engine (`rltrain.weights.receive`). So a bucket costs a
message and not a request, which would take the engine some milliseconds. The weights themselves go another way
(`rltrain.weights.sources`).
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from base64 import b64encode
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor

from rltrain.run.processes import family_of
from rltrain.weights import LOADER
from rltrain.weights.engine import ServerEngine

LOADED = "loaded"  # the report of a rank that has loaded a bucket; any other report says what went wrong

_POLL_SECONDS = 0.2
_MOST_SECONDS = 1800.0  # for a bucket; an engine that dies or hangs is noticed by its role, which ends it
_LENGTH_BYTES = 8


class Channel:
    """Open for the length of one request, in which the engine does nothing but load weights.

    Attributes:
        opened: when, by the monotonic clock.
        pending: number of messages that the engine has not reported on yet.
    """

    def __init__(self, engine: ServerEngine, host: str, version: int, ahead: bool) -> None:
        """Have the engine's ranks call us at this machine's address `host`; it has `version` when we close.

        With `ahead` they receive the next bucket while they load the one before.

        Raises:
            OSError, HttpError: they do not call: the engine has died or refuses.
        """
        self.opened, self.pending = time.monotonic(), 0
        self._ranks: list[socket.socket] = []
        size, key = engine.tensor_parallel_size(), secrets.token_hex()
        self._pool = ThreadPoolExecutor(1)
        with socket.create_server((host, 0), family=family_of(host), backlog=size) as server:
            port = server.getsockname()[1]
            call = {"host": host, "port": port, "key": key, "ahead": ahead}
            calls = [_payload(call | {"rank": rank}) for rank in range(size)]
            self._request: Future[object] = self._pool.submit(
                engine.update_weights_from_tensor, calls, LOADER, str(version)
            )
            try:
                self._ranks = self._accept(server, size, key)
            except BaseException:
                self.drop()
                raise

    def send(self, messages: Sequence[str]) -> None:
        """Send each rank its message."""
        self.pending += 1
        for rank, message in zip(self._ranks, messages, strict=True):
            send_message(rank, message)

    def receive_reports(self) -> list[str]:
        """The next report of each rank.

        Raises:
            OSError: the engine has died.
        """
        reports = [receive_message(rank) for rank in self._ranks]
        if None in reports:
            raise ConnectionError("the engine has hung up while it loaded weights")
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
        """The calls of all ranks, in their order; strangers are sent away."""
        server.settimeout(_POLL_SECONDS)
        ranks: dict[int, socket.socket] = {}
        while len(ranks) < size:
            if self._request.done():
                self._request.result()  # raises, if it says why
                raise ConnectionError("the engine's ranks have not called: they can't reach the trainer")
            try:
                call, _ = server.accept()
            except TimeoutError:
                continue
            call.settimeout(_MOST_SECONDS)
            call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = json.loads(receive_message(call) or "{}")
            if not hmac.compare_digest(str(hello.get("key")), key):
                call.close()
                continue
            ranks[hello["rank"]] = call
        return [ranks[rank] for rank in range(size)]


def call_trainer(host: str, port: int, key: str, rank: int) -> socket.socket:
    """The other end, for a rank of the engine."""
    trainer = socket.create_connection((host, port))
    trainer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    send_message(trainer, json.dumps({"key": key, "rank": rank}))
    return trainer


def send_message(peer: socket.socket, text: str) -> None:
    """Send one message to the other end."""
    data = text.encode()
    peer.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def receive_message(peer: socket.socket) -> str | None:
    """The next message; None when the other end has hung up."""
    length = _receive(peer, _LENGTH_BYTES)
    if length is None:
        return None
    data = _receive(peer, int.from_bytes(length, "little"))
    return None if data is None else data.decode()


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
