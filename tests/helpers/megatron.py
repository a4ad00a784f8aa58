"""Tiny models, rollouts and configurations for tests of the trainer, and a way to run a test on several ranks."""

from __future__ import annotations

import gc
import json
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from helpers.rank import Rank, start_rank
from rltrain.arguments.config import Config
from rltrain.arguments.groups.parallel import Parallel
from rltrain.data.batch import TrainBatch
from rltrain.models.families import FAMILIES
from rltrain.run.role import RoleContext

VOCAB_SIZE = 61  # a prime, so that tensor parallelism has to pad it

# Entries of `tiny_config` for families that have these parts.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
# Of two layers one attends to everything.
LINEAR_AND_FULL = LINEAR | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 24,
    "partial_rotary_factor": 0.5,
}


def tiny_config(architecture: str = "Qwen3ForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of a model with two layers."""
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
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


def tiny_experts_config(**changes: Any) -> dict[str, Any]:
    """Four layers, of which the second has no experts; four experts, two of them for a token."""
    experts = EXPERTS | {"num_hidden_layers": 4, "mlp_only_layers": [1], "norm_topk_prob": True}
    return tiny_config("Qwen3MoeForCausalLM", **experts | changes)


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """A model directory without weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def as_transformers_knows(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in transformers, for one that comes with code of its own."""
    same_as = FAMILIES[config["architectures"][0]].same_as
    return config | ({"model_type": same_as, "architectures": None} if same_as else {})


def write_hf_model(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A model directory with random weights (biases too), written by transformers. Returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(directory, as_transformers_knows(config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "sinks")) or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory)
    if FAMILIES[config["architectures"][0]].same_as:
        write_config(directory, config)
    return directory


def make_config(hf_checkpoint: Path, **changes: Any) -> Config:
    """The configuration of a trainer, with `changes` by flag name after everything has been resolved."""
    from rltrain import arguments

    argv = ["--hf-checkpoint", str(hf_checkpoint), "--prompt-data", "unused.jsonl"]
    argv += ["--rollout-batch-size", "8", "--num-rollout", "4", "--lr", "1e-3", "--weight-decay", "0.1"]
    return arguments.parse(argv).replace(**changes)


class RecordingRegistry:
    """Stands in for the supervisor's registry: keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def make_actor(config: Config, run_dir: Path) -> Any:
    """A trainer of this process's rank, outside of a job. Its metrics lack `perf/…`, which no two runs have alike."""
    from rltrain.megatron.actor import MegatronTrainActor

    rank = int(os.environ.get("RANK", "0"))
    context = RoleContext(run_dir, 0, "trainer", rank, "http://127.0.0.1:9", "")
    actor = MegatronTrainActor(config, context, RecordingRegistry())  # type: ignore[arg-type]
    whole = actor.train
    actor.train = lambda rollout_id, batch: {  # type: ignore[method-assign]
        name: value for name, value in whole(rollout_id, batch).items() if not name.startswith("perf/")
    }
    return actor


def weights_of(trained: Any) -> Any:
    """All weights of an actor or a critic on this rank, a tensor [number of them]."""
    import torch

    return torch.cat([weight.detach().flatten().clone() for m in trained.models for weight in m.parameters()])


def gradient_of(weight: Any) -> Any:
    """For `export_hf_weights`. Zeros for what gets none: a router's bias."""
    gradient = getattr(weight, "main_grad", None)
    return weight.new_zeros(weight.shape) if gradient is None else gradient


def log_probs_of(actor: Any, batch: TrainBatch) -> Any:
    """log π of the trainable tokens of every sample, with the present weights."""
    from rltrain.megatron.training.share import RankShare

    return actor.log_probs(RankShare(actor.config, actor.shape, batch))


def keep_log_probs(actor: Any) -> dict[str, Any]:
    """Have an actor keep the log-probs that it computes, by the prefix of the policy; it may do so once for each."""
    compute, kept = actor.log_probs_and_entropy, dict[str, Any]()

    def keep(share: Any, prefix: str = "") -> Any:
        assert prefix not in kept
        kept[prefix] = compute(share, prefix)
        return kept[prefix]

    actor.log_probs_and_entropy = keep
    return kept


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

    from rltrain.megatron import device
    from rltrain.megatron import ranks as distributed

    device.set_up()
    if not dist.is_initialized():
        distributed.join(Parallel(distributed_timeout_minutes=1), 1234, dist.HashStore(), 0, 1)
    distributed.set_seeds(1234)


def in_each_layout(
    function: Callable[[Config, Path], Any], configs: dict[str, Config], work: Path
) -> dict[str, Any]:
    """`function` in one layout after the other, within the same processes. For a function given to `run_ranks`."""
    results = {}
    for name, each in configs.items():
        split_anew(each)
        results[name] = function(each, work / name)
    return results


def by_sizes(configs: dict[str, Config]) -> dict[str, Config]:
    """Those that split the ranks alike beside one another: to split them takes longer than most tests."""

    def sizes(config: Config) -> tuple[int, ...]:  # what `rltrain.megatron.ranks.are_split` compares
        of = config.parallel
        tensor, experts = of.tensor_model_parallel_size, of.expert_model_parallel_size
        inside = of.expert_tensor_parallel_size or tensor
        return tensor, of.pipeline_model_parallel_size, of.context_parallel_size, experts, inside

    return dict(sorted(configs.items(), key=lambda named: sizes(named[1])))


def split_anew(config: Config) -> None:
    """Split the ranks of this process group, which were split for another test, for this one."""
    from rltrain.megatron.ranks import are_split, split_ranks

    if not are_split(config.parallel):
        leave_groups()
    split_ranks(config.parallel, config.optimizer.seed)


def leave_groups() -> None:
    """Give up the groups of a layout before this one: each has threads, and a test of forty would have thousands.

    They end with the last reference, and a model has references to itself. One with experts has some that no
    collection sees: its dispatchers of tokens keep the last pass's graph, whose hooks keep the model.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
    from torch.distributed import distributed_c10d

    from rltrain.megatron.ranks import control_group

    dist.barrier(group=control_group())
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group not in (dist.group.WORLD, control_group()):
            dist.destroy_process_group(group)
    for dispatcher in (each for each in gc.get_objects() if issubclass(type(each), MoETokenDispatcher)):
        vars(dispatcher).clear()
    for _ in range(3):  # what one frees may have held more
        gc.collect()


def in_rounds(shares: Iterator[list[tuple[str, Any]]]) -> dict[str, np.ndarray]:
    """All of this rank's tensors; nobody begins a round before all have ended the one before."""
    import torch
    import torch.distributed as dist

    from rltrain.megatron.ranks import control_group

    share: dict[str, np.ndarray] = {}
    while True:
        named = next(shares, None)
        have = torch.tensor(0 if named is None else 1)
        dist.all_reduce(have, group=control_group())
        if not have:
            return share
        share |= {name: tensor.float().clone().numpy() for name, tensor in named or ()}


def gather_gradients(chunks: list[Any]) -> None:
    """Undo what a distributed optimizer does: each rank has only its shard of the gradients' sums."""
    import torch.distributed as dist

    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def adamw_step(weights: dict[str, Any], gradients: dict[str, Any], config: Config) -> dict[str, Any]:
    """One step of torch's AdamW on fp32 copies of bf16 weights, after clipping; in bf16 again."""
    import torch

    copies = {name: torch.nn.Parameter(weight.float()) for name, weight in weights.items()}
    for name, copy in copies.items():
        copy.grad = torch.from_numpy(gradients[name]).clone()
    torch.nn.utils.clip_grad_norm_(copies.values(), config.optimizer.clip_grad)
    groups = [  # neither norms nor biases decay
        {"params": [p for p in copies.values() if (p.ndim == 1) == flat], "weight_decay": decay}
        for flat, decay in ((False, config.optimizer.weight_decay), (True, 0.0))
    ]
    betas = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
    torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=betas, eps=config.optimizer.adam_eps).step()
    return {name: copy.detach().bfloat16() for name, copy in copies.items()}


@contextmanager
def running_ranks(
    function: Callable[..., Any], config: Any, work: Path, *, world_size: int = 2
) -> Iterator[list[Rank]]:
    """`function(config, work)` on every rank of a new process group, each rank a new process; see `run_ranks`."""
    work.mkdir(parents=True, exist_ok=True)
    config = by_sizes(config) if isinstance(config, dict) else config
    (work / "job.pickle").write_bytes(pickle.dumps((function.__module__, function.__qualname__, config)))
    with socket.create_server(("127.0.0.1", 0)) as supervisor:  # ranks look which address leads here
        url = "http://{}:{}".format(*supervisor.getsockname())
        ranks = [start_rank(work, url, rank, world_size) for rank in range(world_size)]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


def run_ranks(
    function: Callable[..., Any],
    config: Config | dict[str, Config],
    work: Path,
    *,
    world_size: int = 2,
) -> list[Any]:
    """Call `function(config, work)` on every rank of a new process group, each rank a new process.

    Args:
        function: A function at the top of a test module.
        config: Of the trainer, or of several layouts that `function` goes through itself, given in `by_sizes`' order.
        work: A directory for files of the exchange, and for the function's own.

    Returns:
        What each rank returned.
    """
    with running_ranks(function, config, work, world_size=world_size) as ranks:
        for index, rank in enumerate(ranks):
            assert rank.wait() == 0, f"rank {index}:\n{rank.said()}"
    return [pickle.loads((work / f"result-{rank}.pickle").read_bytes()) for rank in range(world_size)]
