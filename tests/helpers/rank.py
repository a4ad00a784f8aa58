"""One rank of `helpers.megatron.run_ranks`, which meets the others as a trainer in a job does."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import time
from pathlib import Path

from rltrain.run.role import RoleAddress, RoleContext


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
