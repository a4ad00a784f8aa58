"""What both converters need: a model in one process, or in those that torchrun or srun started."""

from __future__ import annotations

import os
from pathlib import Path

from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.arguments.groups.parallel import Parallel
from rltrain.run.errors import UserError
from rltrain.run.files import read_object

# A conversion has no rollouts, but these are flags that no run can do without.
_UNUSED = ["--prompt-data=none", "--num-rollout=1", "--use-dynamic-batch-size", "--max-tokens-per-gpu=1"]


def model_args(argv: list[str], directory: Path) -> Config:
    """Flags of a model, as for training; the type of its weights is the one in `config.json`.

    Raises:
        UserError: the flags cannot be right, or `directory` is not a Hugging Face model.
    """
    ranks = world_size()
    unused = [*_UNUSED, f"--rollout-batch-size={ranks}", f"--actor-num-gpus-per-node={ranks}"]
    config = arguments.parse([*unused, *argv, f"--hf-checkpoint={directory}"])
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: it has no config.json, so it is not a Hugging Face model.")
    hf_config = read_object(path)
    bf16 = (hf_config.get("dtype") or hf_config.get("torch_dtype")) == "bfloat16"
    # Converting only copies: it needs host memory, which a large model fits into, and no GPU, which it may not fit on.
    return config.replace(bf16=bf16 or bool(config.model.bf16), distributed_backend="gloo")


def world_size() -> int:
    """How many processes convert together."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def start(parallel: Parallel, seed: int) -> None:
    """Form the process group, unless there is one already, on the CPU: no GPU is seen from here on."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from rltrain.megatron import device

    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID") or "0")
    device.set_up()
    import torch.distributed as dist

    from rltrain.megatron import ranks as distributed

    if dist.is_initialized():
        distributed.split_ranks(parallel, seed)
    elif world_size() == 1:
        distributed.join(parallel, seed, dist.HashStore(), 0, 1)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, world_size(), rank == 0)
        distributed.join(parallel, seed, store, rank, world_size())
