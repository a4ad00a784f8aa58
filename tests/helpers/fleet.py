"""A running fleet of real parts under a real supervisor, seen by its trainer; for tests and benchmarks.

Two models are served: the actor, by two engines, and a judge that the reward asks. In place of the trainer
there is a process that waits; batches are asked for and weights sent with the trainer's own functions.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import tomli_w
import torch
import yaml
from safetensors.torch import load_file

from helpers.engine import GivenWeights, running_requests
from helpers.local_job import PATIENCE, wait_until
from helpers.megatron import init_single_process
from helpers.run_files import events_of
from helpers.tiny_model import make_model
from rltrain import arguments
from rltrain.megatron.push import WeightPush
from rltrain.rollout.service.client import RolloutClient
from rltrain.run.files import replace_text
from rltrain.run.http import HttpError, call
from rltrain.run.layout import RunLayout
from rltrain.run.role import Registry, RoleContext
from rltrain.run.waiting import Interrupted, answer_unless_interrupted, ask
from rltrain.sglang.engines import find_engines
from rltrain.sglang.process import READY_TIMEOUT

TESTS = Path(__file__).parents[1]
# In place of the trainer: leaves its environment where the test finds it, and waits to be ended.
TRAINER = (
    "import json, os, sys, time; open(sys.argv[1], 'w').write(json.dumps(dict(os.environ))); time.sleep(3600)"
)
SUPERVISOR = """
import dataclasses, sys
from pathlib import Path
from hpc.planning.job_plan import make_plan
from hpc.supervisor.supervisor import Supervisor
from rltrain import arguments
run_dir, env_file, code = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
plan = make_plan(arguments.load(run_dir))
trainer = (sys.executable, "-c", code, env_file)
processes = [dataclasses.replace(each, argv=trainer) if each.role == "trainer" else each for each in plan.processes]
Supervisor(run_dir, dataclasses.replace(plan, processes=tuple(processes)), stop_grace=1.0, max_engine_restarts=9)()
"""
FLAGS = """
 --rollout-batch-size 4 --n-samples-per-prompt 4 --num-rollout 9 --rollout-max-response-len 200 --label-key label
 --max-failed-fraction 0
 --rollout-health-check-interval 1 --rollout-health-check-timeout 10
"""


def check_batch(table: pa.Table, versions: set[str]) -> None:
    """No sample is missing or failed, and all were generated with known weights."""
    assert table.num_rows == 16
    assert set(table["status"].to_pylist()) <= {"completed", "truncated"}
    assert {version for each in table["weight_versions"].to_pylist() for version in each} == versions


class Fleet:
    """The running job, seen by its trainer."""

    def __init__(self, directory: Path, prompts: Path, flags: str = "") -> None:
        self.layout = RunLayout(directory / "run")
        self.layout.root.mkdir()
        self.models = [make_model(directory / f"model-{seed}", seed=seed) for seed in range(3)]
        group = {"worker_type": "regular", "num_gpus": 1}
        actor = {"name": "actor", "server_groups": [group, group]}
        judge = {"name": "judge", "model_path": str(self.models[2]), "server_groups": [group]}
        (directory / "fleet.yaml").write_text(yaml.safe_dump({"sglang": [actor, judge]}))
        files = ["--hf-checkpoint", str(self.models[0]), "--prompt-data", str(prompts)]
        files += [
            "--sglang-config",
            str(directory / "fleet.yaml"),
            "--custom-rm-path",
            "fakes.judged_reward.ask_judge",
        ]
        self.config = arguments.parse([*files, *FLAGS.split(), *flags.split()])
        self._write_config()
        self._env_file = directory / "env.json"
        self.supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(self.layout.root), str(self._env_file), TRAINER],
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
            stderr=subprocess.DEVNULL,
        )

    def connect(self) -> None:
        """Wait until everything is up."""
        wait_until(lambda: self._env_file.exists() and self._env_file.read_text().endswith("}"))
        env = json.loads(self._env_file.read_text())
        names = ("REGISTRY", "TOKEN")
        self.url, self.token = (env[f"SLURMLIME_{name}"] for name in names)
        context = RoleContext(self.layout.root, 0, "trainer", 0, self.url, self.token)
        self.registry = Registry(context)
        self.registry.wait_for("engine", 3, READY_TIMEOUT)
        self.rollout = RolloutClient(self.registry.wait_for("rollout")[0].url, context.token)
        self.rollout.load(0)
        init_single_process()
        self._context = context
        self.use_transport(self.config.weights.update_weight_transport)

    def _write_config(self) -> None:
        replace_text(self.layout.config, tomli_w.dumps({"train": arguments.dump(self.config)}))

    def use_transport(self, name: str) -> None:
        """Send weights by this transport from now on; an engine that is started again is one of such a run."""
        self.config = self.config.replace(update_weight_transport=name)
        self._write_config()
        weights = GivenWeights(lambda: self._tensors(), self.models[0])
        self.weight_push = WeightPush(self.config, self._context, weights, self.registry.event)

    def push(self, version: int, fault: Callable[[], object] = lambda: None) -> None:
        """Send the weights of a model to the actor's engines, as the trainer does; `fault` happens half-way."""
        self.version = version
        self.registry.status("weights", version)
        weights = list(load_file(self.models[version % 2] / "model.safetensors").items())
        faults = iter([fault])  # once, however often the weights are sent

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from weights[: len(weights) // 2]
            next(faults, lambda: None)()
            yield from weights[len(weights) // 2 :]

        self._tensors = tensors
        try:
            self.weight_push.push(self.find_engines, version)
        finally:
            self.registry.status("generating", version)

    def find_engines(self) -> Any:
        return find_engines(self.config.engines, self.config.debug, self.registry, self.token)

    def generate(self, rollout_id: int, fault: Callable[[], object] = lambda: None) -> pa.Table:
        """A batch; `fault` happens while it is generated. Engines that come back are given the weights meanwhile."""
        answer = ask(self.rollout.generate, rollout_id)
        wait_until(self.is_generating)
        fault()
        deadline = time.monotonic() + 300
        while isinstance(
            batch := answer_unless_interrupted(
                self.registry, answer, lambda: self.weight_push.is_lacked(self.find_engines)
            ),
            Interrupted,
        ):
            assert batch is Interrupted.NEWCOMERS and time.monotonic() < deadline
            self.push(self.version)
        return batch[0]

    def is_generating(self) -> bool:
        """Whether an engine of the actor is at work."""
        return any(self._running(each.url) for each in self.registry.find("engine") if each.index < 2)

    def _running(self, url: str) -> int:
        try:
            return running_requests(url, self.token)
        except OSError:  # it has just died
            return 0

    def server(self, index: int) -> psutil.Process:
        """The SGLang server of an engine."""
        role = next(each for each in self.registry.find("engine") if each.index == index)
        return psutil.Process(role.pid).children()[0]

    def scheduler(self, index: int) -> psutil.Process:
        children = self.server(index).children(recursive=True)
        return next(child for child in children if "schedul" in child.name())

    def router(self, model: int = 0) -> Any:
        return next(each for each in self.registry.find("router") if each.index == model)

    def workers(self, model: int = 0) -> list[dict[str, Any]]:
        try:
            return call("GET", f"{self.router(model).url}/workers", self.token)["workers"]
        except (OSError, HttpError):
            return []

    def is_whole(self, version: int) -> bool:
        """Whether both of the actor's engines are behind the router, with these weights."""
        urls = [each.url for each in self.registry.find("engine") if each.index < 2]
        healthy = [worker["url"] for worker in self.workers() if worker["is_healthy"]]
        if len(urls) < 2 or sorted(urls) != sorted(healthy):
            return False
        engines = self.find_engines()
        return len(engines) == 2 and {each.get_weight_version() for each in engines} == {str(version)}

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Look seldom: each look asks several parts, on the cores on which an engine is just being started."""

        def look() -> object:
            time.sleep(0.3)
            return condition()

        wait_until(look)

    def wait_until_whole(self, version: int) -> None:
        """Go on as the trainer does while it waits, until both of the actor's engines are back."""

        def look() -> bool:
            if self.weight_push.is_lacked(self.find_engines):
                self.push(version)
            return self.is_whole(version)

        self.wait_until(look)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events_of(self.layout, kind)


@contextmanager
def running_fleet(directory: Path, flags: str = "") -> Iterator[Fleet]:
    """One in `directory`, whose engines have the weights of version 1."""
    prompts = directory / "prompts.jsonl"
    # Long enough for something to happen meanwhile.
    params = {"sampling_params": {"ignore_eos": True}}
    rows = [{"input": f"{i}+{i}=", "label": "0", "metadata": params} for i in range(20)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fleet = Fleet(directory, prompts, flags)
    try:
        fleet.connect()
        fleet.push(1)
        yield fleet
    finally:
        fleet.supervisor.send_signal(signal.SIGTERM)
        try:
            fleet.supervisor.wait(timeout=PATIENCE)
        finally:
            fleet.supervisor.kill()
