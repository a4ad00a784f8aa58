"""Fixtures that many tests share: a tiny model, and one real engine behind one real router for all of them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import make_model

from rltrain.arguments.config import Config

os.environ.setdefault("OMP_NUM_THREADS", "1")
with suppress(ImportError):  # a GPU node's environment may lack it
    from hypothesis import settings

    settings.load_profile("ci")  # the same examples everywhere, and no limit of 200 ms to each

pytest_plugins = [
    "helpers.parallel",
    "helpers.local_job",
    "helpers.slurm_fixture",
    "helpers.slurm_job",
    "helpers.recorded_runs",
]

TOKEN = "test-token-0123456789"
FAKES = Path(__file__).parent / "fakes"


@pytest.fixture(scope="module", autouse=True)
def _process_groups_are_given_up() -> Iterator[None]:
    """Each has threads, which the tests after it would share the cores with: one split of the ranks has 72."""
    before = _threads_of_groups()
    yield
    left = _threads_of_groups() - before
    assert left < 300, f"{left} threads of process groups: helpers.megatron.split_anew ends those before"


def _threads_of_groups() -> int:
    found = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that has just ended
            found += "gloo" in path.read_text()
    return found


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tiny random Qwen3 and a character tokenizer."""
    return make_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without weights, which is quicker."""
    return make_model(tmp_path_factory.mktemp("tiny_tokenizer"), weights=False)


@pytest.fixture(scope="session")
def demo_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `rltrain.demo.assets` writes; a test that writes there copies it first."""
    from rltrain.demo.assets import write_assets

    directory = tmp_path_factory.mktemp("demo") / "demo"
    write_assets(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny Qwen3 for all tests of the trainer, with random weights; no test may write to it."""
    from helpers.megatron import init_single_process, tiny_config, write_hf_model

    init_single_process()
    return write_hf_model(tmp_path_factory.mktemp("tiny_qwen3"), tiny_config())


@pytest.fixture(scope="module")
def model_dir(tiny_qwen3: Path) -> Path:
    """The same, for a module whose tests are the only trainer rank, and start from the same random numbers."""
    from helpers.megatron import init_single_process

    init_single_process()
    return tiny_qwen3


@pytest.fixture(scope="session")
def router() -> Iterator:
    """The real sglang-router."""
    from rltrain.sglang.router import Router

    with Router({}, TOKEN) as router:
        yield router


@pytest.fixture(scope="session")
def engine(tiny_model: Path, router) -> Iterator:
    """A real SGLang server with the tiny model, joined to `router`; it samples by seeds."""
    from rltrain.sglang.adapter import HttpServerEngineAdapter

    server_args = {"model_path": str(tiny_model), "enable_deterministic_inference": True}
    with HttpServerEngineAdapter.launch(server_args, TOKEN) as engine:
        engine.register(router.url)
        yield engine


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """20 additions with their results as labels."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"input": f"{i}+{i % 7}=", "label": str(i + i % 7), "metadata": {"number": i}} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_args(tiny_tokenizer: Path, prompt_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """Arguments as the rollout process sees them: 4 groups of 2 from `prompt_file`, and the given flags."""
    from rltrain.arguments import parse
    from rltrain.rollout.service.server import prepare
    from rltrain.run.layout import RunLayout

    def make(*flags: str) -> Config:
        defaults = (
            f"--hf-checkpoint {tiny_tokenizer} --prompt-data {prompt_file} --label-key label --rm-type exact"
            " --num-rollout 3 --rollout-batch-size 4 --n-samples-per-prompt 2 --rollout-max-response-len 16"
        )
        args = parse([*defaults.split(), *flags])
        return prepare(args, RunLayout(tmp_path / "run"))

    return make


@pytest.fixture(scope="session")
def gateway_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run whose samples come from agents, with a tiny model that thinks and calls tools."""
    from fakes.agents import agent_config, make_agent_model

    directory = tmp_path_factory.mktemp("agent")
    return agent_config(make_agent_model(directory / "model"), directory)


@pytest.fixture(scope="session")
def parsers(gateway_config: Config) -> Any:
    """The gateway's, for that model."""
    from rltrain.agents.gateway.parsers import Parsers
    from rltrain.data.tokenizer import load_tokenizer

    return Parsers(load_tokenizer(gateway_config.model.hf_checkpoint), gateway_config.engines.sglang)


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fakes/custom_extensions.py`, functions as users write them in place of ours, with no calls noted yet."""
    monkeypatch.syspath_prepend(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    import custom_extensions

    return importlib.reload(custom_extensions)
