"""A job whose machines reach each other by IPv6 addresses: here on `::1`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import aiohttp
import psutil
import pytest
from fakes.agents import agent_config, make_agent_model, params

from hpc.doctor.machine import check_address
from hpc.supervisor.registry import RegistryServer
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.server import Gateway
from rltrain.agents.program import at
from rltrain.arguments.external import parse_address
from rltrain.data.tokenizer import load_tokenizer
from rltrain.run.errors import UserError
from rltrain.run.files import EventLog, StatusFile, read_lines
from rltrain.run.http import HttpError, call, make_url
from rltrain.run.processes import reserve_port
from rltrain.run.role import Registry, RoleContext
from rltrain.sample import Sample
from rltrain.sglang.routers import RouterAddress

TESTS, HOST = Path(__file__).parents[1], "::1"
FLAGS = (
    "--name run --label-key label --custom-rm-path fakes.reward.by_content --num-rollout 2 --rollout-batch-size 2"
    " --n-samples-per-prompt 2 --rollout-max-response-len 8 --wandb-mode disabled"
    " --update-weight-transport distributed"
)
# A class of this program, not of a module, is what the job's process gets by value.
SUBMIT = """
import sys
from hpc import submit
from hpc.supervisor import supervisor

class OnIPv6(supervisor.Supervisor):
    def _host(self):
        return "::1"

supervisor.Supervisor = OnIPv6
sys.exit(submit.main())
"""


def has_ipv6() -> bool:
    try:
        with socket.create_server((HOST, 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


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


@pytest.mark.slow
def test_a_run_of_real_parts(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"input": f"{i}+1=", "label": str(i + 1)} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--hf-checkpoint", str(tiny_model), "--prompt-data", str(tmp_path / "prompts.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, *FLAGS.split(), *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/run"
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1]
    ready = {
        event["role"]: event["url"]
        for event in read_lines(run / "events.jsonl")
        if event["kind"] == "role_ready"
    }
    assert ready.keys() == {"router", "engine", "rollout", "trainer"}
    assert all("://[::1]:" in url for url in ready.values()), ready
