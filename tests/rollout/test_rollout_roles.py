"""The roles as the supervisor starts them: processes that find each other through the registry."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import tomli_w
from conftest import TOKEN
from helpers.engine import living, load_weights
from helpers.local_job import wait_until

from hpc.supervisor.registry import RegistryServer
from rltrain import arguments
from rltrain.rollout.service.client import RolloutClient
from rltrain.run.errors import EXIT_NEVER_RESTART
from rltrain.run.files import EventLog, StatusFile
from rltrain.run.http import call
from rltrain.run.layout import RunLayout
from rltrain.run.role import Registry, RoleContext
from rltrain.schema import read_table
from rltrain.sglang.adapter import HttpServerEngineAdapter

pytestmark = pytest.mark.slow

MODULES = {"router": "rltrain.sglang.router", "engine": "rltrain.sglang.engine", "rollout": "rltrain.rollout"}


@dataclass
class Job:
    """A run directory, a registry, and the roles started so far."""

    layout: RunLayout
    registry: RegistryServer
    roles: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def context(self, role: str) -> RoleContext:
        return RoleContext(self.layout.root, 0, role, 0, self.registry.url, TOKEN)

    def start(self, role: str) -> subprocess.Popen[bytes]:
        names = ("RUN_DIR", "ATTEMPT", "ROLE", "INDEX", "REGISTRY", "TOKEN")
        values = (self.layout.root, 0, role, 0, self.registry.url, TOKEN)
        environment = {f"SLURMLIME_{name}": str(value) for name, value in zip(names, values, strict=True)}
        with self.log(role).open("wb") as log:
            self.roles[role] = subprocess.Popen(
                [sys.executable, "-m", MODULES[role]],
                env={**os.environ, **environment}, stdout=log, stderr=log, cwd=Path(__file__).parents[2],
            )  # fmt: skip
        return self.roles[role]

    def log(self, role: str) -> Path:
        return self.layout.root / f"{role}.log"

    def url(self, role: str) -> str:
        return Registry(self.context("test")).wait_for(role, timeout=400)[0].url


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    registry = RegistryServer(TOKEN, EventLog(layout.events, 0), StatusFile(layout.status, 0))
    job = Job(layout, registry)
    yield job
    for process in job.roles.values():
        process.kill()
        process.wait()
    registry.close()


def write_config(job: Job, model: Path, prompts: Path, *flags: str) -> None:
    words = (
        f"--hf-checkpoint {model} --prompt-data {prompts} --label-key label --rm-type exact --num-rollout 3"
        " --rollout-batch-size 4 --n-samples-per-prompt 2 --rollout-max-response-len 16"
        f" --eval-interval 1 --eval-prompt-data dev {prompts}@[:5] --eval-temperature 0"
    )
    args = arguments.parse([*words.split(), *flags])
    job.layout.config.write_text(tomli_w.dumps({"train": arguments.dump(args)}))


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def libraries(process: subprocess.Popen[bytes]) -> set[str]:
    """Shared libraries that it has loaded."""
    return {each.path for each in psutil.Process(process.pid).memory_maps() if ".so" in Path(each.path).name}


def test_a_batch_and_an_evaluation_through_router_and_engine(
    job: Job, tiny_model: Path, prompt_file: Path
) -> None:
    write_config(job, tiny_model, prompt_file)
    for role in MODULES:
        job.start(role)
    client = RolloutClient(job.url("rollout"), TOKEN)
    load_weights(HttpServerEngineAdapter(job.url("engine"), TOKEN), tiny_model, "0")  # as the trainer does

    client.load(0)
    imported = libraries(job.roles["rollout"])
    table, metrics = client.generate(0)
    # Pandas comes with pyarrow's first conversion: while the engine was waited for, not while the trainer waits.
    assert not [each for each in libraries(job.roles["rollout"]) - imported if "/pandas/" in each]
    assert table.num_rows == 8 and metrics["rollout/failed_ratio"] == 0
    stored = read_table(job.layout.step_dir(0, 0))
    assert stored["tokens"].to_pylist() == table["tokens"].to_pylist()
    first, second = client.eval(0), client.eval(0)
    assert first == second  # greedy
    assert 0 < first["eval/dev/response_length"] <= 16
    assert read_table(job.layout.eval_dir("dev", 0, 0)).num_rows == 5

    engine, router = HttpServerEngineAdapter(job.url("engine"), TOKEN), job.url("router")
    body = {"input_ids": [4, 13, 5, 16, 7, 8], "sampling_params": {"max_new_tokens": 1}}
    cached = []
    for _ in range(2):
        engine.flush_cache()
        cached += [
            call("POST", f"{router}/generate", TOKEN, body)["meta_info"]["cached_tokens"] for _ in range(2)
        ]
    assert cached[0] == cached[2] == 0 and cached[1] == cached[3] > 0

    for role, process in job.roles.items():
        assert TOKEN not in job.log(role).read_text(), f"{role} logs the token"
        for each in [psutil.Process(process.pid), *descendants(process)]:
            assert TOKEN not in " ".join(each.cmdline())
    children = [child for process in job.roles.values() for child in descendants(process)]
    shared = [Path(file.path) for child in children for file in child.open_files() if "/dev/shm" in file.path]
    assert any(path.exists() for path in shared)
    for process in job.roles.values():
        process.terminate()
    assert [process.wait(timeout=400) for process in job.roles.values()] == [0, 0, 0]
    assert living(children, timeout=30) == []
    assert not any(path.exists() for path in shared)


def test_an_engine_role_that_is_killed_takes_its_server_with_it(
    job: Job, tiny_model: Path, prompt_file: Path
) -> None:
    write_config(job, tiny_model, prompt_file)
    engine = job.start("engine")
    wait_until(lambda: descendants(engine))
    children = descendants(engine)
    engine.kill()
    engine.wait()
    assert living(children, timeout=30) == []


def test_a_rollout_process_that_cannot_work_says_why_and_asks_not_to_be_restarted(
    job: Job, tiny_tokenizer: Path, prompt_file: Path
) -> None:
    write_config(job, tiny_tokenizer, prompt_file, "--custom-rm-path", "no_such_module.reward")
    assert job.start("rollout").wait(timeout=400) == EXIT_NEVER_RESTART
    assert "error: --custom-rm-path no_such_module.reward" in job.log("rollout").read_text()
