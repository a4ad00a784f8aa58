"""What Slurm starts in the place of a role: `python -m hpc.task SPEC`. It becomes the role after three things.

Output goes to the role's own log: srun's patterns for it are wrong in heterogeneous jobs. The task takes its rank and
its GPUs from its position. And it no longer hears the signals by which Slurm announces a preemption: they reach every
process of the job at once, but a trainer that saves needs the others until it is done. The supervisor is told, and
decides. Standard library only: this runs inside the role's container too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_ANNOUNCEMENTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def make_spec(
    role: str,
    first_index: int,
    argv: Sequence[str],
    log_dir: Path,
    gpus: tuple[int, int] | None,
    *,
    ranks: bool = False,
    spans: bool = False,
) -> str:
    """The word that `main` understands.

    Args:
        role: name of the role.
        first_index: index of the first of the tasks that are started together.
        argv: command of the role.
        log_dir: where its log goes.
        gpus: the first GPU and the number of GPUs that the tasks on a node see; None for none.
        ranks: whether the tasks are ranks of torch.distributed.
        spans: whether the tasks are the parts of one engine, a node each; they share its index.
    """
    return json.dumps(
        {
            "role": role,
            "index": first_index,
            "argv": list(argv),
            "log_dir": str(log_dir),
            "gpus": gpus,
            "ranks": ranks,
            "spans": spans,
        }
    )


def task_env(spec: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """Variables of one task, from what Slurm says about it in `env`."""
    rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
    own = {"SLURMLIME_INDEX": str(spec["index"] if spec["spans"] else spec["index"] + rank)}
    if spec["spans"]:
        own |= {"SLURMLIME_NODE_RANK": str(rank), "SLURMLIME_NNODES": env["SLURM_NTASKS"]}
    if spec["ranks"]:
        world_size = int(env["SLURM_NTASKS"])
        local_world_size = world_size // int(env["SLURM_NNODES"])
        own |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        own |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_world_size)}
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first, count = spec["gpus"] or (0, 0)
        own["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + count])
    return own


def main() -> NoReturn:
    """Become the role."""
    spec = json.loads(sys.argv[1])
    env = task_env(spec, os.environ)
    node = env.get("SLURMLIME_NODE_RANK", "0")
    name = f"{spec['role']}-{env['SLURMLIME_INDEX']}" + ("" if node == "0" else f".node{node}")
    log = Path(spec["log_dir"]) / f"{name}.log"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ANNOUNCEMENTS)
    argv = spec["argv"]
    try:
        os.execvpe(argv[0], argv, {**os.environ, **env})
    except OSError as error:
        sys.exit(f"can't start {argv[0]} on {os.uname().nodename}: {error.strerror}")


if __name__ == "__main__":
    main()
