"""The program that Slurm starts for a role: `python -m hpc.supervisor.task SPEC`. It ends by becoming the role.

Output goes to the role's own log: srun's patterns for it are wrong in heterogeneous jobs. The task takes its rank and
its GPUs from its position. And it no longer hears the signals by which Slurm announces a preemption: they reach every
process of the job at once, but a trainer that saves needs the others until it is done. The supervisor is told, and
decides. Engines and routers have something to clean up on their node: SIGUSR1 ends them, which srun passes on.
Standard library only: this runs inside the role's container too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rltrain.run.files import share_like

_ANNOUNCEMENTS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
END = signal.SIGUSR1
_NO_DEVICES = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; the last is Slurm's
CLEANS_UP = ("engine", "router")  # roles that END ends


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
    """The SPEC that `main` reads.

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
        own["CUDA_VISIBLE_DEVICES"] = _own_gpus(spec, visible)
    return own


def _own_gpus(spec: Mapping[str, Any], visible: str) -> str:
    """The planned part of what the step sees. A rank that Slurm has bound to one GPU keeps that one.

    Raises:
        ValueError: Slurm shows fewer GPUs than are planned.
    """
    first, count = spec["gpus"] or (0, 0)
    devices = visible.split(",")
    if devices[0] in _NO_DEVICES:
        return ""  # the CPU is meant
    if len(devices) >= first + count:
        return ",".join(devices[first : first + count])
    if spec["ranks"] and len(devices) == 1:
        return visible
    raise ValueError(
        f"the plan gives this task GPUs {first} to {first + count - 1} of the node, but Slurm shows it"
        f" {len(devices)} (CUDA_VISIBLE_DEVICES={visible}). Remove gpu-bind, gpus-per-task and the like from the"
        " [slurm.srun] and [slurm.sbatch] tables."
    )


def main() -> NoReturn:
    """Become the role."""
    spec = json.loads(sys.argv[1])
    try:
        env = task_env(spec, os.environ)
    except ValueError as error:
        sys.exit(f"can't start {spec['role']} on {os.uname().nodename}: {error}")
    node = env.get("SLURMLIME_NODE_RANK", "0")
    name = f"{spec['role']}-{env['SLURMLIME_INDEX']}" + ("" if node == "0" else f".node{node}")
    log = Path(spec["log_dir"]) / f"{name}.log"
    share_like(log.parent)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ANNOUNCEMENTS - ({END} if spec["role"] in CLEANS_UP else set()))
    argv = spec["argv"]
    try:
        os.execvpe(argv[0], argv, {**os.environ, **env})
    except OSError as error:
        sys.exit(f"can't start {argv[0]} on {os.uname().nodename}: {error.strerror}")


if __name__ == "__main__":
    main()
