"""One rank of `helpers.megatron.run_ranks`, which meets the others as a trainer in a job does."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rltrain.run.role import RoleAddress, RoleContext

# Ranks are forked from a process that has imported what they need: that takes longer than most of them run.
# transformers imports much of itself only when rank 0 reads the model's configuration, and the others wait for it.
# The module of a rank's function is a test's, which imports pytest.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "pytest",
        "rltrain.megatron.actor",
        "safetensors.torch",
        "transformers.models.auto.configuration_auto",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.integrations.accelerate",
    ]
)
_SPAWNS = multiprocessing.get_context("spawn")
_LIMIT = 900  # seconds of a process group; pytest's own limit is 1200


class FileRegistry:
    """The registry's part in the rendezvous, through a file."""

    def __init__(self, work: Path) -> None:
        self._file = work / "trainer-0"

    def register(self, url: str) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(url)
        temporary.rename(self._file)

    def wait_for(self, role: str, count: int = 1, timeout: float = 600.0) -> list[RoleAddress]:
        deadline = time.monotonic() + timeout
        while not self._file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return [RoleAddress(role, 0, self.read(), 0, "")]

    def read(self) -> str:
        return self._file.read_text()


def main(work: Path, registry_url: str) -> None:
    import torch.distributed as dist

    from rltrain.megatron.ranks import init_process_group

    module, name, config = pickle.loads((work / "job.pickle").read_bytes())
    rank = int(os.environ["RANK"])
    context = RoleContext(work, 0, "trainer", rank, registry_url, "token")
    # A test of several layouts has the configuration of each; the ranks are split anew for all but the first.
    first = next(iter(config.values())) if isinstance(config, dict) else config
    registry = FileRegistry(work)
    init_process_group(context, registry, first.parallel, first.optimizer.seed)
    # Code of the user's finds them as under torchrun.
    assert registry.read() == f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    function = getattr(importlib.import_module(module), name)
    gc.freeze()  # a collection between two layouts need not look at what was imported: that took a second
    result = function(config, work)
    (work / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def run_in_process(work: Path, registry_url: str, env: dict[str, str], output: Path) -> None:
    """What a new process does: it has the environment and the output of a rank."""
    os.environ.clear()
    os.environ.update(env)
    with output.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    main(work, registry_url)


@dataclass(frozen=True)
class Rank:
    """A process of a group, as `helpers.megatron.running_ranks` starts them."""

    process: BaseProcess
    output: Path

    def wait(self, seconds: float = _LIMIT) -> int:
        """Its exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it did not end in {seconds:.0f} s:\n{self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        """The end of what it printed."""
        return self.output.read_text(errors="replace")[-5000:]


def _new_processes() -> Any:
    """CUDA does not survive a fork, and what is imported may have asked it for the number of GPUs."""
    import torch

    return _SPAWNS if torch.cuda.is_available() else _FORKS


def start_rank(work: Path, url: str, rank: int, world_size: int) -> Rank:
    """A new process that is this rank of a group."""
    env = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    output = work / f"output-{rank}.txt"
    process = _new_processes().Process(target=run_in_process, args=(work, url, env, output))
    process.start()
    return Rank(process, output)
