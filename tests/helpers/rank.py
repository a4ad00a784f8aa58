"""One rank of `helpers.megatron.run_ranks`, which meets the others as a trainer in a job does."""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import sys
import time
from pathlib import Path

from rltrain.runtime import RoleAddress, RoleContext


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

    from rltrain.megatron.distributed import init_process_group

    module, name, args = pickle.loads((work / "job.pickle").read_bytes())
    rank = int(os.environ["RANK"])
    context = RoleContext(work, 0, "trainer", rank, registry_url, "token")
    # A test of several layouts has the arguments of each; the ranks are split anew for all but the first.
    first = args if isinstance(args, argparse.Namespace) else next(iter(args.values()))
    registry = FileRegistry(work)
    init_process_group(context, registry, first)
    # Code of the user's finds them as under torchrun.
    assert registry.read() == f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    result = getattr(importlib.import_module(module), name)(args, work)
    (work / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
