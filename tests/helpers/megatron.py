"""Tiny models, rollouts and arguments for tests of the trainer, and a way to run a test on several ranks."""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rltrain.data.batch import TrainBatch
from rltrain.runtime import RoleContext

REPOSITORY = Path(__file__).parents[2]
_LIMIT = 570  # seconds of a process group; pytest's own limit is 600
VOCAB_SIZE = 61  # a prime, so that tensor parallelism has to pad it


def tiny_config(architecture: str = "Qwen3ForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of a model with two layers."""
    model_type = {"Qwen3MoeForCausalLM": "qwen3_moe"}.get(
        architecture, architecture.removesuffix("ForCausalLM").lower()
    )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "dtype": "float32",
        **changes,
    }


def tiny_experts_config() -> dict[str, Any]:
    """Four layers, of which the second has no experts; four experts, two of them for a token."""
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    }
    return tiny_config("Qwen3MoeForCausalLM", num_hidden_layers=4, mlp_only_layers=[1], **experts)


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A model directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_hf_model(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A model directory with random weights (biases too), written by transformers. Returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(directory, config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    return directory


def make_args(hf_checkpoint: Path, **changes: Any) -> argparse.Namespace:
    """Arguments as `rltrain.arguments` resolves them, for the trainer."""
    from rltrain import arguments

    argv = ["--hf-checkpoint", str(hf_checkpoint), "--prompt-data", "unused.jsonl"]
    argv += ["--rollout-batch-size", "8", "--num-rollout", "4", "--lr", "1e-3", "--weight-decay", "0.1"]
    args = arguments.parse(argv)
    for name, value in changes.items():
        if not hasattr(args, name):
            raise AttributeError(name)
        setattr(args, name, value)
    return args


class RecordingRegistry:
    """Stands in for the supervisor's registry: keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def make_actor(args: argparse.Namespace, run_dir: Path) -> Any:
    """A trainer of this process's rank, outside of a job. Its metrics lack `perf/…`, which no two runs have alike."""
    from rltrain.megatron.actor import MegatronTrainActor

    rank = int(os.environ.get("RANK", "0"))
    context = RoleContext(run_dir, 0, "trainer", rank, "http://127.0.0.1:9", "")
    actor = MegatronTrainActor(args, context, RecordingRegistry())  # type: ignore[arg-type]
    whole = actor.train
    actor.train = lambda rollout_id, batch: {  # type: ignore[method-assign]
        name: value for name, value in whole(rollout_id, batch).items() if not name.startswith("perf/")
    }
    return actor


def log_probs_of(actor: Any, batch: TrainBatch) -> Any:
    """log π of the trainable tokens of every sample, with the present weights."""
    from rltrain.megatron.rank_share import RankShare

    return actor.log_probs(RankShare(actor.args, actor.shape, batch))


def make_batch(
    count: int = 8, *, seed: int = 0, longest: int = 12, vocab_size: int = VOCAB_SIZE, masked: int = 0
) -> TrainBatch:
    """A rollout of random tokens; the first `masked` samples are not trained on."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, longest, count)
    responses = rng.integers(1, longest, count)
    masks = [(rng.random(n) < 0.8).astype(np.int8) for n in responses]
    for i, mask in enumerate(masks):
        mask[-1] = 1
        if i < masked:
            mask[:] = 0
    return TrainBatch(
        tokens=[
            rng.integers(0, vocab_size, p + r).astype(np.int32)
            for p, r in zip(prompts, responses, strict=True)
        ],
        response_lengths=responses.tolist(),
        loss_masks=masks,
        train_rewards=rng.normal(size=count).astype(np.float32),
        rollout_log_probs=[-rng.random(n).astype(np.float32) * 5 for n in responses],
    )


def init_single_process() -> None:
    """This process as the only trainer rank. Calling it again starts from the same random numbers."""
    import torch.distributed as dist

    from rltrain.megatron import device, distributed

    device.set_up()
    if not dist.is_initialized():
        args = argparse.Namespace(
            distributed_backend=None,
            distributed_timeout_minutes=1,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            context_parallel_size=1,
            expert_model_parallel_size=1,
            expert_tensor_parallel_size=None,
            seed=1234,
        )
        distributed.join(args, dist.HashStore(), 0, 1)
    distributed.set_seeds(1234)


def in_each_layout(
    function: Callable[[argparse.Namespace, Path], Any], args: dict[str, argparse.Namespace], work: Path
) -> dict[str, Any]:
    """`function` in one layout after the other, within the same processes. For a function given to `run_ranks`."""
    from rltrain.megatron.distributed import split_ranks

    results = {}
    for name, each in args.items():
        leave_groups()
        split_ranks(each)
        results[name] = function(each, work / name)
    return results


def leave_groups() -> None:
    """Give up the groups of a layout before this one: each has threads, and a test of forty would have thousands.

    They end with the last reference, and a model has references to itself.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    from rltrain.megatron.distributed import control_group

    dist.barrier(group=control_group())
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group not in (dist.group.WORLD, control_group()):
            dist.destroy_process_group(group)
    gc.collect()


def run_ranks(
    function: Callable[..., Any],
    args: argparse.Namespace | dict[str, argparse.Namespace],
    work: Path,
    *,
    world_size: int = 2,
) -> list[Any]:
    """Call `function(args, work)` on every rank of a new process group, each rank a new process.

    Args:
        function: A function at the top of a test module.
        args: Of the trainer, or of several layouts that `function` goes through itself.
        work: A directory for files of the exchange, and for the function's own.

    Returns:
        What each rank returned.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "job.pickle").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    with socket.create_server(("127.0.0.1", 0)) as supervisor:  # ranks look which address leads here
        url = "http://{}:{}".format(*supervisor.getsockname())
        processes = [_start_rank(work, url, rank, world_size) for rank in range(world_size)]
        try:
            outputs = [process.communicate(timeout=_LIMIT)[0].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank}:\n{outputs[rank][-5000:]}"
    return [pickle.loads((work / f"result-{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _start_rank(work: Path, url: str, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
    }
    command = [sys.executable, "-m", "helpers.rank", str(work), url]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
