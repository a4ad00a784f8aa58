"""Engines that get their weights straight from the trainer: they die, hang or refuse, and come back with them."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, check_batch, running_fleet

from rltrain.weights.session import Session

pytestmark = pytest.mark.slow


FLAGS = "--update-weight-buffer-size 20000 --update-weight-transport"


def test_by_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_fleet(tmp_path, f"{FLAGS} tensor") as fleet:
        engines_are_killed(fleet)
        one_refuses(fleet, monkeypatch)


def test_by_process_groups(tmp_path: Path) -> None:
    with running_fleet(tmp_path, f"{FLAGS} distributed") as fleet:
        engines_are_killed(fleet)
        one_hangs(fleet)


def engines_are_killed(fleet: Fleet) -> None:
    """One in the middle of a push, and the scheduler of the other while it generates."""
    fleet.push(2, fault=fleet.server(1).kill)
    # From then on there is no engine with weights, until one comes back and the trainer gives it some.
    check_batch(fleet.generate(1, fleet.scheduler(0).kill), {"2"})
    died = {(event["role"], event["index"]) for event in fleet.events("role_died")}
    assert {("engine", 0), ("engine", 1)} <= died
    fleet.wait_until_whole(2)


def one_hangs(fleet: Fleet) -> None:
    """In the middle of a push: it is left out, ended and started again."""
    fleet.push(3, fault=lambda: fleet.scheduler(0).send_signal(signal.SIGSTOP))
    check_batch(fleet.generate(2), {"3"})
    fleet.wait_until_whole(3)
    assert "has been stopped for" in (fleet.layout.log_dir(0) / "engine-0.log").read_text()


def one_refuses(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds a tensor that is not the trainer's, twice: it is left out, ended and started again."""
    wrong, told, really_tell = fleet.find_engines()[1].url, [], Session.tell

    def tell(self: Any, engine: Any, bucket: Any, source: Any) -> None:
        if engine.url == wrong:
            told.append(bucket.pieces[0].name)
            bucket = replace(bucket, digests=[digest + 1 for digest in bucket.digests])
        really_tell(self, engine, bucket, source)

    monkeypatch.setattr(Session, "tell", tell)
    fleet.push(3)
    assert told and told == told[: len(told) // 2] * 2  # everything was sent twice
    failed = fleet.events("weights_not_taken")[-1]
    assert failed["url"] == wrong
    assert f"{told[0]} has another checksum than the trainer's" in failed["reason"]
    check_batch(fleet.generate(2), {"3"})
    fleet.wait_until_whole(3)
    assert f"expelled by the trainer: {wrong}" in (fleet.layout.log_dir(0) / "engine-1.log").read_text()
