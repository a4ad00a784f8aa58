"""What others on the machine reach of a run on its real parts while it trains: docs/security.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.local_job import OPEN_PATHS, OPEN_TO_ALL, Seen, look_at, own_addresses

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FLAGS = (
    "--name run --label-key label --custom-rm-path fakes.reward.by_content --lr 1e-3 --num-rollout 12"
    " --rollout-batch-size 4 --n-samples-per-prompt 4 --rollout-max-response-len 12"
    " --sglang-enable-deterministic-inference --wandb-mode disabled"
)


@pytest.fixture(scope="module")
def seen(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A run is looked at after its first step, and ends well."""
    work = tmp_path_factory.mktemp("seen")
    prompts = [{"input": f"{i}+1=", "label": str(i + 1)} for i in range(20)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    files = ["--hf-checkpoint", str(tiny_model), "--prompt-data", str(work / "prompts.jsonl")]
    with (work / "said").open("w+") as said:
        command = [sys.executable, "-m", "hpc.submit", *FLAGS.split(), *files]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        process = subprocess.Popen(command, cwd=work, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            metrics, deadline = work / "runs/run/metrics.jsonl", time.monotonic() + 600
            while not metrics.exists() or not metrics.read_text():
                assert process.poll() is None and time.monotonic() < deadline, (work / "said").read_text()
                time.sleep(0.05)
            looked = look_at(process.pid, work / "runs/run")
            assert process.wait(600) == 0, (work / "said").read_text()
        finally:
            process.terminate()
            process.wait(120)
    return looked


def test_a_run_listens_as_the_documentation_says(seen: Seen) -> None:
    table = (TESTS.parent / "docs/security.md").read_text().partition("\n|---|---|---|---|\n")[2]
    documented = {row.split("|")[1].strip() for row in table.partition("\n\n")[0].splitlines()}
    assert set(seen.ports) == documented - {"srun"}
    assert {address for found in seen.ports.values() for address, *_ in found} <= own_addresses()


def test_another_user_of_the_machine_gets_nothing_of_a_run(seen: Seen) -> None:
    assert seen.secret_shown == []
    if seen.taken is None:
        pytest.skip("needs root, to become another user, and the system's Python")
    assert seen.taken["user"] == 65534 and seen.taken["tried"] > 50
    assert (seen.taken["files"], seen.taken["sockets"]) == ([str(OPEN_TO_ALL)], [])

    answered: dict[tuple[str, int], set[str]] = {}
    for url in seen.taken["urls"]:
        where, _, path = url.removeprefix("http://").partition("/")
        host, _, port = where.rpartition(":")
        answered.setdefault((host, int(port)), set()).add("/" + path)
    (counters,) = [each for each in seen.ports["router"] if "/metrics" in answered.get(each, ())]
    del answered[counters]  # whatever is asked there is answered with counters
    (router,), (engine,) = seen.ports["router"] - {counters}, seen.ports["engine"]
    # The router asks the engine for some of them, which may be waiting for the trainer just now.
    allowed = {engine: {"/health", "/metrics"}, router: OPEN_PATHS - {"/metrics"}}
    assert set(answered) == set(allowed)
    assert [found - allowed[each] for each, found in answered.items()] == [set(), set()]
