"""The registry, spoken to by the client that roles use and by clients that mean ill."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.local_job import wait_until
from helpers.run_files import lines_of

from hpc.supervisor.registry import MAX_BODY_BYTES, RegistryServer
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.role import Registry, RoleAddress, RoleContext

TOKEN = "t0ken-" + "x" * 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    registry = RegistryServer(
        TOKEN, EventLog(tmp_path / "events.jsonl", 4), StatusFile(tmp_path / "status.json", 4)
    )
    yield registry
    registry.close()


def client(server: RegistryServer, role: str, index: int = 0) -> Registry:
    return Registry(RoleContext(Path(), 4, role, index, server.url, TOKEN))


def call(server: RegistryServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """One request; `body` is bytes, or sent as JSON."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, {"Authorization": f"Bearer {TOKEN}", **headers})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer)


def test_roles_find_each_other_in_order_of_index(server: RegistryServer) -> None:
    found: list[RoleAddress] = []
    waiting = threading.Thread(
        target=lambda: found.extend(client(server, "trainer").wait_for("engine", 2, 60))
    )
    waiting.start()
    client(server, "engine", 1).register("http://b")
    time.sleep(0.1)
    assert waiting.is_alive()
    begun = time.monotonic()
    client(server, "engine", 0).register("http://a")
    waiting.join(timeout=60)
    assert time.monotonic() - begun < 15  # told at once, not at the end of the poll
    assert [(role.index, role.url) for role in found] == [(0, "http://a"), (1, "http://b")]


def test_waiting_ends_with_those_found_so_far(server: RegistryServer) -> None:
    client(server, "engine").register("http://a")
    with pytest.raises(TimeoutError, match="only 1 of 2 engine"):
        client(server, "trainer").wait_for("engine", 2, timeout=0.2)


def test_a_role_that_comes_back_replaces_its_address(server: RegistryServer) -> None:
    client(server, "engine").register("http://old")
    client(server, "engine").register("http://new")
    assert [role.url for role in client(server, "x").wait_for("engine")] == ["http://new"]


def test_stop_events_and_status(server: RegistryServer, tmp_path: Path) -> None:
    trainer = client(server, "trainer")
    assert trainer.stop_requested() is None
    server.request_stop("SIGTERM received")
    assert trainer.stop_requested() == "SIGTERM received"

    trainer.event("checkpoint_saved", step=7, path="x")
    trainer.status("training", 7)
    trainer.status("saving")
    (event,) = lines_of(tmp_path / "events.jsonl")
    assert {**event, "time": 0, "elapsed_s": 0} == {
        "time": 0, "elapsed_s": 0, "attempt": 4, "kind": "checkpoint_saved", "role": "trainer", "step": 7, "path": "x",
    }  # fmt: skip
    assert abs(event["time"] - time.time()) < 60
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["phase"], status["step"], status["attempt"]) == ("saving", 7, 4)


def test_nothing_without_the_token(server: RegistryServer, tmp_path: Path) -> None:
    server.request_stop("secret reason")
    for header in ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer té"]:
        for method, path in [("GET", "/roles/engine"), ("GET", "/stop"), ("GET", "/x"), ("POST", "/events")]:
            code, answer = call(server, method, path, {"kind": "x"}, Authorization=header)
            assert code == 401, (header, method, path)
            assert "secret" not in json.dumps(answer)
    assert not (tmp_path / "events.jsonl").exists()


def test_requests_that_make_no_sense(server: RegistryServer) -> None:
    requests: list[tuple[str, str, Any, int]] = [
        ("GET", "/nothing", None, 404),
        ("GET", "/roles/engine?count=x", None, 400),
        ("GET", "/roles/engine?wait=nan", None, 400),
        ("POST", "/nothing", {}, 404),
        ("POST", "/roles", {"role": "engine"}, 400),
        ("POST", "/roles", b"{", 400),
        ("POST", "/roles", [1], 400),
        ("POST", "/events", {"no": "kind"}, 400),
        ("POST", "/events", b" " * (MAX_BODY_BYTES + 1), 413),
        ("POST", "/events", None, 400),
    ]
    for method, path, body, code in requests:
        assert call(server, method, path, body)[0] == code, (method, path)
        assert call(server, "GET", "/stop")[0] == 200  # it serves on


def test_nobody_writes_another_time_or_attempt(server: RegistryServer, tmp_path: Path) -> None:
    assert call(server, "POST", "/events", {"kind": "x", "time": 1, "attempt": 9, "self": 2})[0] == 200
    assert (
        call(server, "POST", "/status", {"phase": "training", "time": 1, "attempt": 9, "self": 2})[0] == 200
    )
    status = json.loads((tmp_path / "status.json").read_text())
    for written in (lines_of(tmp_path / "events.jsonl")[0], status):
        assert (written["attempt"], written["self"]) == (4, 2)
        assert written["time"] > 1e9


def test_closing_answers_those_who_wait(tmp_path: Path) -> None:
    server = RegistryServer(TOKEN, EventLog(tmp_path / "e", 0), StatusFile(tmp_path / "s", 0))
    answers: list[tuple[int, Any]] = []
    waiting = threading.Thread(target=lambda: answers.append(call(server, "GET", "/roles/engine?wait=30")))
    waiting.start()
    wait_until(lambda: server._waiters)  # the question is there
    begun = time.monotonic()
    server.close()
    waiting.join(timeout=60)
    assert time.monotonic() - begun < 20
    assert answers == [(200, {"roles": []})]
