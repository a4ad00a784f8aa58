"""The process groups of a trainer's rank with engines: one that waits for its engine holds up no other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# In processes of their own: a group that waits can't be stopped. The second engine comes, and the first one never.
TRAINER = """
import json, os, sys, threading, time, torch
from rltrain.weights.buckets import Chunk
from rltrain.weights.sources import Reader, describe
from rltrain.weights.transports.distributed import EngineGroups

groups = EngineGroups("127.0.0.1", "gloo", 0)
chunks = [Chunk(0, torch.arange(8, dtype=torch.uint8))]
source = describe(groups.source(chunks))
for name in ("first", "second"):
    threading.Thread(target=groups.broadcast, args=(Reader(name, 0, 1), chunks), daemon=True).start()
    time.sleep(1.0)  # until it waits for its engine
print(json.dumps(source), flush=True)
sys.stdin.read()
os._exit(0)
"""
ENGINE = """
import json, sys
from rltrain.weights.sources import Reader, source_of

print(source_of(json.loads(sys.argv[1])).read(Reader("second", 0, 1)).tolist(), flush=True)
"""


def test_a_group_that_waits_for_its_engine_holds_up_no_other() -> None:
    """Engines join the groups of several ranks in different orders: otherwise all could wait for each other."""
    command = [sys.executable, "-c", TRAINER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            assert trainer.stdout is not None
            source = trainer.stdout.readline()
            assert json.loads(source)["kind"] == "group"
            engine = [sys.executable, "-c", ENGINE, source]
            done = subprocess.run(engine, capture_output=True, text=True, timeout=240)
        finally:
            trainer.kill()
    assert done.stdout.strip() == str([*range(8)]), done.stderr
