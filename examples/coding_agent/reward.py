"""The reward: a test of the file that the agent has left, in a clean sandbox of its own."""

from __future__ import annotations

import argparse

from rltrain.agents.sandbox.kinds import launch
from rltrain.agents.sandbox.limits import MIB, Limits
from rltrain.agents.sandbox.sandbox import Sandbox
from rltrain.sample import Sample

LIMITS = Limits(memory=256 * MIB, processes=8, disk=MIB)


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """1 if the test, the label, passes on the answer, the content of the file."""
    async with Sandbox(launch("bubblewrap", LIMITS), LIMITS) as sandbox:
        await sandbox.write("solution.py", sample.response.encode())
        await sandbox.write("test.py", (sample.label or "").encode())
        ended = await sandbox.run(["python3", "test.py"], seconds=10)
    return float(not ended.failure)
