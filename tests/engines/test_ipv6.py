"""What a job whose machines reach each other by IPv6 addresses needs, on `::1`; test_slime_examples.py runs one."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import aiohttp
import psutil
import pytest
from fakes.agents import agent_config, make_agent_model, params
from helpers.local_job import has_ipv6

from hpc.doctor.machine import check_address
from hpc.supervisor.registry import RegistryServer
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.server import Gateway
from rltrain.agents.program import at
from rltrain.arguments.external import parse_address
from rltrain.data.tokenizer import load_tokenizer
from rltrain.run.errors import UserError
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.http import HttpError, call, make_url
from rltrain.run.processes import reserve_port
from rltrain.run.role import Registry, RoleContext
from rltrain.sample import Sample
from rltrain.sglang.routers import RouterAddress

HOST = "::1"

pytestmark = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def listening() -> set[str]:
    connections = psutil.Process().net_connections("inet")
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


def test_addresses_stand_in_brackets_in_urls() -> None:
    assert make_url("fd00::3", 80) == make_url("[fd00::3]", 80) == "http://[fd00::3]:80"
    assert make_url("node3", 80, "tcp") == "tcp://node3:80"
    assert at("http://127.0.0.1:5/v1", ("fd00::3", 6)) == "http://[fd00::3]:6/v1"
    # As slime's functions put them together.
    assert (
        "http://{}:{}/x".format(*RouterAddress("http://[fd00::3]:80", "").host_and_port)
        == "http://[fd00::3]:80/x"
    )
    assert parse_address("[fd00::3]:80", "here") == "http://[fd00::3]:80"
    for text in ("fd00::3:80", "::1", "[::1]"):
        with pytest.raises(UserError, match=r"\[fd00::3\]:30000"):
            parse_address(text, "here")
    assert check_address(["::1"]).level == "warn" and check_address(["fd00::3"]).level == "ok"


def test_registry_and_its_clients(tmp_path: Path) -> None:
    server = RegistryServer(
        "t0ken", EventLog(tmp_path / "events.jsonl", 0), StatusFile(tmp_path / "status.json", 0), HOST
    )
    try:
        assert server.url.startswith("http://[::1]:")
        context = RoleContext(tmp_path, 0, "engine", 0, server.url, "t0ken")
        assert context.host == HOST
        Registry(context).register(make_url(context.host, 1))
        assert Registry(context).find("engine")[0].url == "http://[::1]:1"
        with pytest.raises(HttpError, match="token is missing or wrong"):
            call("GET", f"{server.url}/stop", "another")
    finally:
        server.close()
    with reserve_port(HOST) as reserved:
        assert reserved.getsockname()[0] == HOST


def test_stores_of_ranks() -> None:
    from torch.distributed import TCPStore

    from rltrain.megatron.ranks import interface_of
    from rltrain.weights.sources import open_store

    before, store = listening(), open_store(HOST, timedelta(seconds=30))
    assert listening() - before <= {HOST} and HOST in listening()
    TCPStore(HOST, store.port, is_master=False, timeout=timedelta(seconds=30)).set("key", "value")
    assert store.get("key") == b"value"
    assert interface_of(HOST) == interface_of("127.0.0.1") == "lo"


@pytest.mark.slow
def test_gateway(tmp_path: Path) -> None:
    config = agent_config(make_agent_model(tmp_path / "model"), tmp_path)
    parsers = Parsers(load_tokenizer(config.model.hf_checkpoint), config.engines.sglang)

    async def main() -> list[int]:
        async with (
            Gateway(config, HOST, parsers) as gateway,
            gateway.open(Sample(index=1, prompt="task"), params(config)) as session,
            aiohttp.ClientSession() as client,
        ):
            assert session.base_url.startswith("http://[::1]:")
            answers = []
            for key in (session.api_key, "another"):
                url, headers = f"{session.base_url}/models", {"Authorization": f"Bearer {key}"}
                async with client.get(url, headers=headers) as response:
                    answers.append(response.status)
            return answers

    assert asyncio.run(main()) == [200, 401]
