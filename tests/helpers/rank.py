"""One rank of `helpers.megatron.run_ranks`."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path


def main(work: Path) -> None:
    import torch.distributed as dist

    from rltrain.megatron import device, distributed

    module, name, args, values = pickle.loads((work / "job.pickle").read_bytes())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device.set_up()
    (work / "store").mkdir(exist_ok=True)
    store = dist.FileStore(str(work / "store" / "rendezvous"), world_size)
    store.set_timeout(timedelta(seconds=60))
    distributed.join(args, store, rank, world_size)
    result = getattr(importlib.import_module(module), name)(args, *values)
    (work / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
