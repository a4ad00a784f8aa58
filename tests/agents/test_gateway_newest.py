"""The newest clients of OpenAI and Anthropic, in an environment of their own, as an agent's program in its sandbox."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from fakes.agents import agent_config, make_agent_model, params, running_gateway

from rltrain.agents.gateway import server
from rltrain.agents.rollout import run_command
from rltrain.inputs import check_agents
from rltrain.sample import Sample

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONTRACT = Path(__file__).with_name("client_contract.py")
PYTHON = Path(sys.prefix) / "clients/bin/python"  # `make test` makes it from requirements/clients.txt
CALL = '<think>\nhm, then\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>'
TOOL_LOOP, FORM = [CALL, "the answer is 12"], '{"total": 12}'
SAYS = [*TOOL_LOOP, FORM, "first", "second", "so END and more", *TOOL_LOOP, FORM, *TOOL_LOOP, *TOOL_LOOP]


@pytest.mark.skipif(not PYTHON.exists(), reason="no environment for them: `make test` makes one")
def test_the_newest_clients_have_what_they_expect(tmp_path: Path) -> None:
    config = agent_config(
        make_agent_model(tmp_path / "model"), tmp_path, "--rm-type", "f1", "--agent-command", f"python {CONTRACT}",
        "--agent-python", str(PYTHON),
    )  # fmt: skip
    check_agents(config.agents)

    async def main() -> list[Sample]:
        async with running_gateway(config) as (gateway, engine):
            server.set_gateway(gateway)
            engine.says = list(SAYS)
            try:
                samples = await run_command(config.namespace, Sample(index=1, prompt="x"), params(config))
            finally:
                server.set_gateway(None)
            return samples

    samples = asyncio.run(main())
    record = samples[0].metadata["agent"]
    assert record["failure"] == "", record["stderr"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "requirements/clients.txt").read_text().splitlines()
        if "==" in line
    )
    assert record["answer"] == f"openai {pinned['openai']}, anthropic {pinned['anthropic']}"
    turns = samples[0].metadata["agent_session"]["turns"]
    loops = [turn["parent"] for turn in turns if turn["origin"] == "append"]
    assert len(turns) == len(SAYS) and len(loops) == 4, turns  # each tool's result goes on with its call
