"""The job's registry: roles announce themselves, find each other, and report what happens.

A small HTTP server in the supervisor. Every request needs the job's token; bodies are JSON. The client is
`rltrain/run/role.py`.

    POST /roles {role, index, url, pid, host}     announce
    GET  /roles/ROLE?count=N&wait=S               those announced, as soon as there are N, or after S seconds
    POST /offers {name, value}                    leave a word for another process
    GET  /offers/NAME?wait=S                      {"value": text}, as soon as it is there; null after S seconds
    POST /events {kind, …}    POST /status {phase, step, …}    GET /stop → {"reason": null or text}
"""

from __future__ import annotations

import functools
import hmac
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rltrain.run import finished
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.http import make_url
from rltrain.run.processes import family_of

MAX_BODY_BYTES = 64 * 1024
MAX_WAIT_SECONDS = 60.0

_ADDRESS_FIELDS = {"role": str, "index": int, "url": str, "pid": int, "host": str}


class _Refused(Exception):  # noqa: N818 (an answer, not an error of ours)
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, eq=False)
class _Waiter:
    """Somebody who waits; woken once, when `is_met`: to wake all for every role that comes would be quadratic."""

    is_met: Callable[[], bool]
    woken: threading.Event = field(default_factory=threading.Event)


class RegistryServer:
    """Serves until closed, each request in a thread of its own."""

    def __init__(self, token: str, events: EventLog, status: StatusFile, host: str = "127.0.0.1") -> None:
        self._authorization = f"Bearer {token}".encode()
        self._events, self._status = events, status
        self._roles: dict[str, dict[int, dict[str, Any]]] = {}
        self._offers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._stop_reason: str | None = None
        self._is_finished = False
        self._unsaved: str | None = None
        self._closed = False
        self._server = _Server(self, host)
        serve = functools.partial(self._server.serve_forever, poll_interval=0.1)
        self._thread = threading.Thread(target=serve, name="registry", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        host, port = self._server.server_address[:2]
        return make_url(str(host), port)

    def request_stop(self, reason: str) -> None:
        """Tell every role that asks to save and stop."""
        self._stop_reason = reason

    @property
    def is_finished(self) -> bool:
        """Whether the trainer has proven in this attempt that the run is finished."""
        return self._is_finished

    @property
    def unsaved(self) -> str | None:
        """Why the newest checkpoint of this attempt could not be written; None if it was, or if there is none."""
        return self._unsaved

    def url_of(self, role: str, index: int) -> str | None:
        """Where a role listens; None if it has not announced itself."""
        with self._lock:
            address = self._roles.get(role, {}).get(index)
        return address["url"] if address else None

    def forget(self, role: str, index: int) -> None:
        """Remove a role that has died, and what it offered."""
        with self._lock:
            self._roles.get(role, {}).pop(index, None)
            self._offers.pop(f"{role}-{index}", None)

    def close(self) -> None:
        """Stop serving; requests that wait are answered with what there is."""
        with self._lock:
            self._closed = True
            self._wake()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def is_authorized(self, header: str) -> bool:
        """Whether an Authorization header carries the token; takes the same time for every wrong one."""
        return hmac.compare_digest(header.encode("utf-8", "surrogateescape"), self._authorization)

    def get(self, path: str) -> Any:
        """Answer a GET request."""
        url = urlsplit(path)
        if url.path == "/stop":
            return {"reason": self._stop_reason}
        if url.path.startswith("/roles/"):
            count, wait = _count_and_wait(url.query)
            return {"roles": self._wait_for(url.path.removeprefix("/roles/"), count, wait)}
        if url.path.startswith("/offers/"):
            _, wait = _count_and_wait(url.query)
            return {"value": self._await_offer(url.path.removeprefix("/offers/"), wait)}
        raise _Refused(404, f"no such path: {url.path}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Answer a POST request."""
        if path == "/roles":
            self._register(body)
        elif path == "/offers":
            self._take_offer(body)
        elif path == "/events":
            kind = body.pop("kind", None)
            if not isinstance(kind, str):
                raise _Refused(400, "an event needs a kind")
            self._events.append(kind, body)
            self._note(kind, body)
        elif path == "/status":
            self._status.update(body)
        else:
            raise _Refused(404, f"no such path: {path}")
        return {}

    def _note(self, kind: str, body: dict[str, Any]) -> None:
        """Remember the facts that the verdict on the attempt needs."""
        self._is_finished |= kind == finished.EVENT
        if kind == "checkpoint_failed":
            self._unsaved = str(body.get("reason"))
        elif kind == "checkpoint_saved":
            self._unsaved = None

    def _register(self, body: dict[str, Any]) -> None:
        for name, kind in _ADDRESS_FIELDS.items():
            if not isinstance(body.get(name), kind):
                raise _Refused(400, f"a role needs {name} ({kind.__name__})")
        address = {name: body[name] for name in _ADDRESS_FIELDS}
        with self._lock:
            self._roles.setdefault(address["role"], {})[address["index"]] = address
            self._wake()
        self._events.append("role_ready", address)

    def _take_offer(self, body: dict[str, Any]) -> None:
        name, value = body.get("name"), body.get("value")
        if not isinstance(name, str) or not isinstance(value, str):
            raise _Refused(400, "an offer needs name and value (str)")
        with self._lock:
            self._offers[name] = value
            self._wake()

    def _wait_for(self, role: str, count: int, wait: float) -> list[dict[str, Any]]:
        self._wait_until(lambda: len(self._roles.get(role, {})) >= count, wait)
        with self._lock:
            return [address for _, address in sorted(self._roles.get(role, {}).items())]

    def _await_offer(self, name: str, wait: float) -> str | None:
        self._wait_until(lambda: name in self._offers, wait)
        return self._offers.get(name)

    def _wait_until(self, condition: Callable[[], bool], wait: float) -> None:
        waiter = _Waiter(lambda: self._closed or condition())
        with self._lock:
            if waiter.is_met():
                return
            self._waiters.append(waiter)
        waiter.woken.wait(max(0.0, min(wait, MAX_WAIT_SECONDS)))
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        """Wake those who have waited for what has changed; the lock is held."""
        met = [waiter for waiter in self._waiters if waiter.is_met()]
        for waiter in met:
            self._waiters.remove(waiter)
            waiter.woken.set()


def _count_and_wait(query: str) -> tuple[int, float]:
    values = {name: values[-1] for name, values in parse_qs(query).items()}
    try:
        count, wait = int(values.get("count", 1)), float(values.get("wait", 0))
    except ValueError:
        raise _Refused(400, "count and wait are numbers") from None
    if not math.isfinite(wait):
        raise _Refused(400, "wait is a number of seconds")
    return count, wait


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # all ranks of a job may call in the same moment

    def __init__(self, registry: RegistryServer, host: str) -> None:
        self.registry, self.address_family = registry, family_of(host)
        super().__init__((host, 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30  # seconds for a client to send its request

    def do_GET(self) -> None:
        self._answer(lambda: self.server.registry.get(self.path))

    def do_POST(self) -> None:
        self._answer(lambda: self.server.registry.post(self.path, self._read_body()))

    def _answer(self, make: Any) -> None:
        try:
            if not self.server.registry.is_authorized(self.headers.get("Authorization", "")):
                raise _Refused(401, "the job's token is missing or wrong")
            code, answer = 200, make()
        except _Refused as refused:
            code, answer = refused.code, {"error": str(refused)}
        data = json.dumps(answer).encode()
        try:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def _read_body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise _Refused(411, "Content-Length is missing") from None
        if not 0 <= length <= MAX_BODY_BYTES:
            raise _Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            body = json.loads(self.rfile.read(length))
        except ValueError:
            raise _Refused(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise _Refused(400, "the body is not a JSON object")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the caller sees the answer, and the log of the job is for the job."""
