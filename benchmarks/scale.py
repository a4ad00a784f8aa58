"""How the parts of a job grow with it: planning, packing, the scheduling of a rollout, reading many runs or samples.

`python benchmarks/scale.py [PART …]`, parts: plan, packing, rollout, status, runs, report (default: all).

- plan: a Slurm job of 1 to 1000 nodes with 8 GPUs each, planned and its script rendered
- packing: the plan of a step for 16 and for 4 samples a rank, in groups of 8 with a prompt in common (prompts of
  lognormal(5, 0.5), responses of lognormal(6.5, 0.9) tokens, at most 8192 in a micro-batch), for 1 to 4096 ranks; and
  the fullest rank against the bound: the mean, or the longest sample
- rollout: 32 requests an engine, 8 at a time, lognormal in length, through `collect` on a simulated clock, with a
  router that takes turns, for 1 to 4096 engines; against max(longest response, mean work of an engine)
- status: `hpc.status` of up to 5000 runs, whose jobs a Slurm that is a script knows
- runs: `load_runs` of up to 1000 runs of 100 steps: the tables of runs and of steps, against reading the files as JSON
- report: the page of a run of up to 1000 steps of 1000 samples with 32 tokens, of which it has 10 000 (400 MB of files)

Seconds are of processor time, but for what is simulated. `growth` is the exponent from a size to the next: 1 is linear.
The registry with 10 000 roles is in
`benchmarks/cluster/registry.py`, a million samples as a frame in `benchmarks/analysis_reading.py`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
import selectors
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

T = TypeVar("T")

SEED = 0
RANKS = (1, 8, 64, 512, 4096)
ENGINES = (1, 8, 64, 512, 4096)
NODES = (1, 10, 100, 1000)
CAPACITY, GROUP = 8192, 8
PLACES, GROUPS_AN_ENGINE = 8, 4
NOISE = 0.2  # of an exponent; also what a logarithm adds


def timed(work: Callable[[], T], repeats: int = 2) -> tuple[float, T]:
    """Least seconds of processor time, and what it returns."""
    found = []
    for _ in range(repeats):
        gc.collect()
        begun = time.process_time()
        result = work()
        found.append(time.process_time() - begun)
    return min(found), result


def judge(what: str, unit: str, seconds: Mapping[int, float], ideal: float = 1.0) -> None:
    """Print growth from each size to the next, and where it is more than the ideal: linear, or none at all (0)."""
    steps = [
        (small, large, math.log(seconds[large] / seconds[small], large / small))
        for small, large in itertools.pairwise(seconds)
    ]
    worse = [f"{small} to {large} {unit}" for small, large, power in steps if power > ideal + NOISE]
    verdict = f"MORE THAN {ideal:g} from {', '.join(worse)}" if worse else f"nowhere more than {ideal:g}"
    print(f"  {what}: growth {', '.join(f'{power:.2f}' for *_, power in steps)}; {verdict}", flush=True)


def plan(_: Path) -> None:
    """Request, split of nodes, checks against the cluster, processes and script."""
    from hpc.slurm.cluster import ClusterFacts
    from hpc.slurm.nodelist import compress, expand
    from hpc.slurm.partitions import Node, Partition
    from hpc.submitting.command_line import read_request
    from hpc.submitting.slurm_job import plan_job

    def facts(count: int) -> ClusterFacts:
        names = tuple(f"node{i:04d}" for i in range(count))
        nodes = tuple(
            Node(name, "IDLE", None, ("gpu",), 128, 10**6, {"h100": 8}, 0, 0, {}, (), "10.0.0.1")
            for name in names
        )
        partition = Partition("gpu", names, True, "UP", None, None, 0, None, 1, "OFF", 0, None, None)
        return ClusterFacts("scale", "24.05", (partition,), nodes, "preempt/none", True, 30.0, False, None)

    def job(count: int) -> tuple[int, int]:
        words = [
            "--name=scale",
            "--runs-dir=/nowhere",
            "--partition=gpu",
            f"--nodes={count}",
            "--num-rollout=9",
        ]
        words += [
            "--hf-checkpoint=/m",
            "--prompt-data=/p",
            "--rollout-batch-size=64",
            "--n-samples-per-prompt=8",
            "--use-dynamic-batch-size",
            "--max-tokens-per-gpu=8192",
        ]
        request = read_request(words)
        made = plan_job(request.options, request.train, lambda config: config, facts=cluster)
        processes = [name for each in made.plan.processes for name in each.names]
        nodes = compress(expand(compress(node.name for node in cluster.nodes)))
        return len(processes), len(made.script.text()) + len(nodes)

    seconds = {}
    for count in NODES:
        cluster = facts(count)
        seconds[count], (processes, _) = timed(lambda: job(count))  # noqa: B023 (called here)
        print(f"plan of {count:4} nodes, {processes:5} processes: {seconds[count]:.3f} s,"
              f" {seconds[count] / count * 1e3:.2f} ms a node")  # fmt: skip
    judge("planning", "nodes", seconds)


def packing(_: Path) -> None:
    """The plan that every rank makes of all samples of a step."""
    from rltrain.data.packing import plan_step

    for a_rank, shares in itertools.product((16, 4), (False, True)):
        seconds = {}
        for ranks in RANKS:
            count = max(GROUP, ranks * a_rank)
            lengths, prefixes = groups(count)
            given = prefixes if shares else None
            seconds[ranks], made = timed(
                lambda: plan_step(lengths, ranks, max_tokens=CAPACITY, prefixes=given)  # noqa: B023
            )
            loads = [
                sum(lengths[i] for each in rank for i in each)
                - (sum(prefixes.shared(each) for each in rank) if shares else 0)
                for rank in made.micro_batches
            ]
            bound = max(sum(loads) / ranks, max(lengths))
            kind = "shared prompts" if shares else "separate"
            print(f"packing for {ranks:4} ranks, {count:5} samples, {kind}: {seconds[ranks]:.3f} s,"
                  f" {seconds[ranks] / count * 1e6:.0f} µs a sample; fullest rank / bound ="
                  f" {max(loads) / bound:.3f}")  # fmt: skip
        judge("packing", "ranks", seconds)


def groups(count: int) -> tuple[list[int], Any]:
    """Lengths of so many samples in groups, and their prefixes."""
    from rltrain.data.prefixes import Prefixes

    rng = np.random.default_rng(SEED)
    prompts = np.clip(rng.lognormal(5, 0.5, count // GROUP), 16, CAPACITY // 4).astype(int)
    responses = np.clip(rng.lognormal(6.5, 0.9, (count // GROUP, GROUP)), 16, CAPACITY * 3 // 4).astype(int)
    order = tuple(range(count))
    common = tuple(0 if i % GROUP == 0 else int(prompts[i // GROUP]) for i in order)
    return (prompts[:, None] + responses).flatten().tolist(), Prefixes(order, common, order)


class SimulatedClock(selectors.DefaultSelector):
    """Lets no time pass but what the event loop would wait for."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        """What is ready; a wait is over at once."""
        self.now += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop on a simulated clock."""

    def __init__(self) -> None:
        """At second 0."""
        self._simulated = SimulatedClock()
        super().__init__(self._simulated)

    def time(self) -> float:
        """Simulated seconds."""
        return self._simulated.now


class Engines:
    """Stands in for the HTTP client, a router that takes turns, and engines with so many places."""

    def __init__(self, count: int) -> None:
        """All idle."""
        self._places = [asyncio.Semaphore(PLACES) for _ in range(count)]
        self._turns, self._rng = itertools.cycle(range(count)), np.random.default_rng(SEED)
        self.seconds: list[float] = []

    async def post(self, url: str, payload: dict[str, Any], **_: Any) -> dict[str, Any]:
        """An answer after the time that it takes."""
        from fakes.engine_server import answer

        seconds = float(self._rng.lognormal(1.0, 0.9))
        self.seconds.append(seconds)
        async with self._places[next(self._turns)]:
            await asyncio.sleep(seconds)
        return answer(payload)


def rollout(root: Path) -> None:
    """`collect` for one batch."""
    from helpers.tiny_model import make_model

    from rltrain.arguments import parse
    from rltrain.arguments.config import Config
    from rltrain.data.source import RolloutDataSource
    from rltrain.rewards import pool
    from rltrain.rollout.collect import collect
    from rltrain.rollout.generate.http import set_client
    from rltrain.rollout.service.server import collect_garbage_rarely, prepare
    from rltrain.run.layout import RunLayout
    from rltrain.sample import Sample

    async def give_reward(config: Config, sample: Sample) -> None:
        sample.reward = 1.0

    async def batch(config: Config, count: int) -> tuple[float, Engines]:
        engines = Engines(count)
        set_client(engines)  # type: ignore[arg-type]
        begun = asyncio.get_running_loop().time()
        collected = await collect(config, 0, RolloutDataSource(config.namespace))
        assert all(sample.response_length for group in collected.kept for sample in group)
        return asyncio.get_running_loop().time() - begun, engines

    pool.grade = give_reward
    files, prompts = make_model(root / "model", weights=False), root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{i}+{i}="}) + "\n" for i in range(1000)))
    seconds = {}
    collect_garbage_rarely()
    for count in ENGINES:
        words = f"--hf-checkpoint {files} --prompt-data {prompts} --rm-type exact --num-rollout 1"
        words += f" --rollout-batch-size {GROUPS_AN_ENGINE * count} --n-samples-per-prompt {GROUP}"
        words += (
            f" --rollout-max-response-len 16 --rollout-num-gpus {count} --sglang-server-concurrency {PLACES}"
        )
        config = prepare(parse(words.split()), RunLayout(root / f"run-{count}"))
        config.namespace.sglang_router_ip, config.namespace.sglang_router_port = "127.0.0.1", 1
        begun = time.process_time()
        with asyncio.Runner(loop_factory=Loop) as runner:
            wall, engines = runner.run(batch(config, count))
        seconds[count], requests = time.process_time() - begun, len(engines.seconds)
        work = sum(engines.seconds) / (count * PLACES)
        ideal = max(work, max(engines.seconds))
        print(f"rollout of {requests:5} requests at {count:3} engines: simulated {wall:.1f} s, {wall / ideal:.2f} × the"
              f" ideal (longest {max(engines.seconds):.1f} s, work {work:.1f} s); {seconds[count]:.2f} s of processor"
              f" time, {seconds[count] / requests * 1e6:.0f} µs a request")  # fmt: skip
    set_client(None)
    judge("processor time", "engines", seconds)


def status(root: Path) -> None:
    """Reading the runs' files, and putting together what Slurm says of their jobs."""
    from cli import fake_slurm, make_runs

    from hpc.runs.state import look
    from hpc.slurm.client import SlurmClient

    seconds = {}
    for count in (50, 500, 5000):
        place = root / f"runs-{count}"
        make_runs(place, count)
        client = SlurmClient(fake_slurm(root / f"slurm-{count}", count, root / "calls"))
        seconds[count], (found, problem) = timed(lambda: look((), place, client))  # noqa: B023
        assert problem is None and [run.state for run in found] == ["PENDING"] * count
        print(
            f"status of {count:4} runs: {seconds[count]:.2f} s, {seconds[count] / count * 1e3:.2f} ms a run"
        )
    judge("status", "runs", seconds)


def report(root: Path) -> None:
    """A page of 10 000 samples of a run that has more and more."""
    from analysis_reading import write_run

    from analysis import load_run
    from analysis.pages.html import browse

    seconds = {}
    for count in (10_000, 100_000, 1_000_000):
        layout = write_run(root / f"run-{count}", count // 1000, 32, groups=100)
        seconds[count], page = timed(lambda: browse(load_run(layout.root)), repeats=1)  # noqa: B023
        print(
            f"report of 10000 of {count:7} samples: {seconds[count]:.1f} s, {len(page.content) / 1e6:.1f} MB"
        )
    judge("report", "samples", seconds)


def runs(root: Path) -> None:
    """`load_runs` of a directory."""
    from cli import make_runs

    from analysis import load_runs

    seconds = {}
    for count in (10, 100, 1000):
        place = root / f"runs-{count}"
        make_runs(place, count)

        def read() -> int:
            found = load_runs(place)  # noqa: B023 (called here)
            return len(found.runs) + len(found.steps)

        def bare() -> int:
            lines = (path.read_text().splitlines() for path in place.glob("*/metrics.jsonl"))  # noqa: B023
            return len([json.loads(line) for each in lines for line in each])

        seconds[count], rows = timed(read, repeats=1)
        reading, bare_rows = timed(bare, repeats=1)
        assert rows == bare_rows + count
        print(f"load_runs of {count:4} runs: {seconds[count]:.2f} s, {seconds[count] / count * 1e3:.1f} ms a run,"
              f" {seconds[count] / reading:.1f} × reading their metrics as JSON")  # fmt: skip
    judge("reading", "runs", seconds)


PARTS = {
    "plan": plan, "packing": packing, "rollout": rollout, "status": status, "runs": runs, "report": report
}  # fmt: skip


def main() -> None:
    for name in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            PARTS[name](Path(directory))


if __name__ == "__main__":
    main()
