"""A fleet of real parts under a real supervisor, whose parts are killed, hang, or refuse weights while it works."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from fakes.judged_reward import question, verdict
from helpers.engine import living, load_weights
from helpers.fleet import Fleet, check_batch, running_fleet
from helpers.local_job import PATIENCE, wait_until

from rltrain.arguments.config import Config
from rltrain.rollout.generate.http import HttpClient, session_headers
from rltrain.run.http import HttpError, call
from rltrain.sglang.router import Router
from rltrain.sglang.routers import remove_worker
from rltrain.weights.buckets import from_message, message, to_json
from rltrain.weights.session import Session
from rltrain.weights.transports.current import current_weights

pytestmark = pytest.mark.slow

SERVER_FAILED = "error: rltrain.sglang.server"  # what an engine's role says of it


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One for every transport: what engines that are started again are told follows from the one in use."""
    flags = "--update-weight-buffer-size 20000 --update-weight-transport disk"
    with running_fleet(tmp_path_factory.mktemp("fleet"), flags) as fleet:
        yield fleet


def test_a_reward_asks_a_second_model(fleet: Fleet) -> None:
    table = fleet.generate(0)
    check_batch(table, {"1"})
    judge = fleet.router(1).url
    for tokens, reward in list(zip(table["tokens"].to_pylist(), table["reward"].to_pylist(), strict=True))[
        :3
    ]:
        asked = verdict(call("POST", f"{judge}/generate", fleet.token, question(tokens)))
        assert reward == pytest.approx(asked, abs=1e-4)
    infos = [call("GET", f"{worker['url']}/model_info", fleet.token) for worker in fleet.workers(1)]
    assert [info["weight_version"] for info in infos] == ["default"]  # the trainer sends it nothing


def test_every_part_asks_for_the_token(fleet: Fleet) -> None:
    addresses = [each.url for role in ("engine", "router", "rollout") for each in fleet.registry.find(role)]
    paths = ["/generate", "/workers", "/load", "/eval", "/update_weights_from_disk", "/flush_cache",
             "/release_memory_occupation", "/pause_generation"]  # fmt: skip
    refused = []
    for url in (*addresses, fleet.url):
        codes = []
        for path in (*paths, "/roles", "/events", "/status"):
            with pytest.raises(HttpError) as caught:
                call("POST", url + path, "wrong", {})
            codes.append(caught.value.status)
        refused.append(401 in codes and set(codes) <= {401, 404, 405})
    assert all(refused)


# Where a session goes is a matter of ports, which are new in each run: of eight all go to one engine in one run of 100.
@pytest.mark.parametrize(("policy", "sessions"), [("round_robin", 8), ("consistent_hashing", 32)])
def test_requests_of_a_session_go_to_one_engine_if_the_policy_is_so(
    fleet: Fleet, policy: str, sessions: int
) -> None:
    engines = fleet.find_engines()
    with Router({"policy": policy}, fleet.token) as router:
        for index, engine in enumerate(
            engines
        ):  # an engine's answers are known by the version of its weights
            call("POST", f"{engine.url}/update_weight_version", fleet.token, {"new_version": str(index)})
            engine.register(router.url)
        try:
            places = [asyncio.run(ask(router, fleet.token, f"session {i}")) for i in range(sessions)]
        finally:
            for engine in engines:
                call("POST", f"{engine.url}/update_weight_version", fleet.token, {"new_version": "1"})
    assert {len(each) for each in places} == ({2} if policy == "round_robin" else {1})
    assert len(set.union(*places)) == 2


async def ask(router: Router, token: str, session: str) -> set[str]:
    """Versions of the weights that answer the requests of a session."""
    client = HttpClient(token)
    headers = session_headers(Config().replace(router={"policy": "consistent_hashing"}).namespace, session)
    body = {"input_ids": [4, 13, 5, 16], "sampling_params": {"max_new_tokens": 2}}
    try:
        answers = [await client.post(f"{router.url}/generate", body, headers=headers) for _ in range(4)]
    finally:
        await client.close()
    return {answer["meta_info"]["weight_version"] for answer in answers}


def test_engine_and_router_are_killed_while_they_generate(fleet: Fleet) -> None:
    def kill() -> None:
        fleet.server(0).kill()
        os.kill(fleet.router().pid, signal.SIGKILL)

    before = fleet.router().pid
    check_batch(fleet.generate(1, kill), {"1"})
    fleet.wait_until(lambda: fleet.router().pid != before and fleet.is_whole(1))
    died = {(event["role"], event["index"]) for event in fleet.events("role_died")}
    assert {("engine", 0), ("router", 0)} <= died


def test_a_scheduler_that_is_stopped_during_an_update_is_ended(fleet: Fleet) -> None:
    fleet.scheduler(1).suspend()
    fleet.push(2)  # returns although one engine can't answer
    assert current_weights(fleet.layout.weights) == fleet.layout.weights / "v000002"
    check_batch(fleet.generate(2), {"2"})
    fleet.wait_until(lambda: fleet.is_whole(2))
    log = (fleet.layout.log_dir(0) / "engine-1.log").read_text()
    assert "has been stopped for" in log


def test_weights_that_can_not_be_written_leave_those_before(fleet: Fleet) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a full disk: writing fails half-way
    try:
        with pytest.raises(OSError, match=r"v000003 can't be written .*File too large"):
            fleet.push(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert current_weights(fleet.layout.weights) == fleet.layout.weights / "v000002"
    assert fleet.is_whole(2)
    fleet.push(3)
    check_batch(fleet.generate(3), {"3"})


def test_an_engine_with_other_weights_is_not_believed(fleet: Fleet) -> None:
    """As one that has restarted by itself, where the router takes it back at once."""
    broken = fleet.find_engines()[0]
    load_weights(broken, fleet.models[2], "default")
    remove_worker(fleet.router().url, fleet.token, fleet.find_engines()[1].url)
    answers: list[pa.Table] = []
    thread = threading.Thread(target=lambda: answers.append(fleet.generate(4)))
    thread.start()
    wait_until(fleet.is_generating)
    fleet.push(4)  # repairs it
    thread.join(timeout=PATIENCE)
    check_batch(answers[0], {"4"})


# From here on the engines get their weights straight from the trainer, and come back without any.


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_engines_are_killed(fleet: Fleet, transport: str) -> None:
    """One in the middle of a push, and the scheduler of the other while it generates: its role says so and ends."""
    before = len(fleet.events("role_died"))
    fleet.use_transport(transport)
    version = fleet.version + 1
    log = fleet.layout.log_dir(0) / "engine-0.log"
    failures = log.read_text().count(SERVER_FAILED)
    fleet.push(version, fault=fleet.server(1).kill)
    # From then on there is no engine with weights, until one comes back and the trainer gives it some.
    parts = [fleet.server(0), *fleet.server(0).children(recursive=True)]
    check_batch(fleet.generate(version, fleet.scheduler(0).kill), {str(version)})
    codes = {
        (event["role"], event["index"]): event["exit_code"] for event in fleet.events("role_died")[before:]
    }
    assert {("engine", 0), ("engine", 1)} <= codes.keys()
    assert codes["engine", 0] == 1
    assert log.read_text().count(SERVER_FAILED) == failures + 1
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
    assert f"{told[0]} has a checksum other than the trainer's" in failed["reason"]
    check_batch(fleet.generate(version), {str(version)})
    fleet.wait_until_whole(version)
    assert f"expelled by the trainer: {wrong}" in (fleet.layout.log_dir(0) / "engine-1.log").read_text()
