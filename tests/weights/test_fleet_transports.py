"""Engines that get their weights straight from the trainer: they die, hang or refuse, and come back with them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from helpers.engine import living
from helpers.fleet import Fleet, check_batch, running_fleet

from rltrain.weights.buckets import from_message, message, to_json
from rltrain.weights.session import Session

pytestmark = pytest.mark.slow


FLAGS = "--update-weight-buffer-size 20000 --update-weight-transport tensor"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One for both transports: its engines take what they are sent by either."""
    with running_fleet(tmp_path_factory.mktemp("fleet"), FLAGS, judged=False) as fleet:
        yield fleet


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_engines_are_killed(fleet: Fleet, transport: str) -> None:
    """One in the middle of a push, and the scheduler of the other while it generates: its role says so and ends."""
    before = len(fleet.events("role_died"))
    fleet.use_transport(transport)
    version = fleet.version + 1
    fleet.push(version, fault=fleet.server(1).kill)
    # From then on there is no engine with weights, until one comes back and the trainer gives it some.
    parts = [fleet.server(0), *fleet.server(0).children(recursive=True)]
    check_batch(fleet.generate(version, fleet.scheduler(0).kill), {str(version)})
    codes = {
        (event["role"], event["index"]): event["exit_code"] for event in fleet.events("role_died")[before:]
    }
    assert {("engine", 0), ("engine", 1)} <= codes.keys()
    assert codes["engine", 0] == 1
    assert "error: rltrain.sglang.server" in (fleet.layout.log_dir(0) / "engine-0.log").read_text()
    assert living(parts, timeout=30) == []
    fleet.wait_until_whole(version)


def test_an_engine_hangs(fleet: Fleet) -> None:
    """In the middle of a push: it is left out, ended and started again."""
    fleet.use_transport("distributed")
    version = fleet.version + 1
    fleet.push(version, fault=lambda: fleet.scheduler(0).send_signal(signal.SIGSTOP))
    check_batch(fleet.generate(version), {str(version)})
    fleet.wait_until_whole(version)
    assert "has been stopped for" in (fleet.layout.log_dir(0) / "engine-0.log").read_text()


def test_an_engine_refuses(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds a tensor that is not the trainer's, twice: it is left out, ended and started again."""
    fleet.use_transport("tensor")
    version = fleet.version + 1
    wrong, told, really_send = fleet.find_engines()[1].url, [], Session.send

    def send(self: Any, engine: Any, text: str) -> None:
        if engine.url == wrong:
            ((bucket, source),) = from_message(text)
            told.append(bucket.pieces[0].name)
            text = message(to_json(replace(bucket, digests=[each + 1 for each in bucket.digests]), source))
        really_send(self, engine, text)

    monkeypatch.setattr(Session, "send", send)
    fleet.push(version)
    assert told and told == told[: len(told) // 2] * 2  # everything was sent twice
    failed = fleet.events("weights_not_taken")[-1]
    assert failed["url"] == wrong
    assert f"{told[0]} has another checksum than the trainer's" in failed["reason"]
    check_batch(fleet.generate(version), {str(version)})
    fleet.wait_until_whole(version)
    assert f"expelled by the trainer: {wrong}" in (fleet.layout.log_dir(0) / "engine-1.log").read_text()
