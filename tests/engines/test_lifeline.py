"""A role whose supervisor is gone ends itself."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rltrain.run import lifeline, role
from rltrain.run.processes import reserve_port

ROLE = """
import signal, sys
from pathlib import Path
from rltrain.run import lifeline
from rltrain.run.role import RoleContext

{setup}
context = RoleContext(Path("."), 0, "engine", 0, sys.argv[1], "token")
lifeline.end_without_supervisor(context, patience=0.5)
print("at work", flush=True)
signal.pause()
"""


class Supervisor(http.server.BaseHTTPRequestHandler):
    """Answers as a registry does that nobody has asked to stop, or, with another's token, refuses."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Registry)
        body = b'{"reason": null}'
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {server.token}" else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        server.asked.release()

    def log_message(self, *_: object) -> None:
        pass


class Registry(http.server.ThreadingHTTPServer):
    """Counts questions."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Supervisor)
        self.token, self.asked = token, threading.Semaphore(0)


@pytest.fixture
def registry(request: pytest.FixtureRequest) -> Iterator[Registry]:
    with Registry(request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


NOT_TOLD = "lifeline._KILL_SECONDS = 0.2; "  # who is told has as long as usual to end


def start(url: str, setup: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ROLE.format(setup=setup), url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))", 7),
        # On Slurm SIGTERM is an announcement, and SIGUSR1 ends a role.
        (
            "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(8));"
            "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
            8,
        ),
        (NOT_TOLD + "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})", -9),
        (NOT_TOLD + "signal.signal(signal.SIGTERM, signal.SIG_IGN)", -9),
    ],
    ids=["told", "told on Slurm", "can't be told", "does not listen"],
)
def test_a_role_ends_when_its_supervisor_is_gone(setup: str, code: int) -> None:
    with reserve_port("127.0.0.1") as nobody:
        role = start(f"http://127.0.0.1:{nobody.getsockname()[1]}", setup)
        out, _ = role.communicate(timeout=60)
    assert role.returncode == code
    assert "has not answered for 0 s: ending" in out or "has not answered for 1 s: ending" in out


@pytest.mark.parametrize("registry", ["token"], indirect=True)
def test_a_role_whose_supervisor_answers_goes_on(registry: Registry) -> None:
    role = start(f"http://127.0.0.1:{registry.server_port}")
    for _ in range(12):  # twice its patience
        assert registry.asked.acquire(timeout=60)
    assert role.poll() is None
    role.kill()
    role.communicate()


def test_a_role_waits_longer_for_an_answer_than_for_a_lost_supervisor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor writes on the run's disk before it answers: one that stopped for half a minute ended the run."""
    waits: list[float] = []

    def call(method: str, url: str, token: str, body: object, timeout: float) -> dict[str, object]:
        waits.append(timeout)
        return {"reason": None, "roles": [], "value": "x"}

    monkeypatch.setattr(role.http, "call", call)
    asks = role.Registry(role.RoleContext(Path(), 0, "trainer", 0, "http://nowhere", "token"))
    asks.status("training", 3)
    asks.event("checkpoint_saved", step=3)
    asks.stop_requested()
    asks.await_offer("x")
    assert len(waits) == 4 and min(waits) > lifeline.PATIENCE_SECONDS


@pytest.mark.parametrize("registry", ["of another attempt"], indirect=True)
def test_the_registry_of_another_attempt_is_not_its_supervisor(registry: Registry) -> None:
    role = start(f"http://127.0.0.1:{registry.server_port}")
    assert role.wait(timeout=60) == -15
    role.communicate()
