"""Does the run fit into the memory of the GPUs, or of a machine without GPUs?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc.doctor.check import Check, fail, ok, warn
from hpc.doctor.memory import (
    EngineMemory,
    TrainerAsk,
    TrainerMemory,
    both_memory,
    critic_memory,
    engine_memory,
    trainer_memory,
)
from rltrain.arguments.config import Config
from rltrain.arguments.groups.critic import use_critic
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.parallel import Parallel, ParallelSizes
from rltrain.arguments.groups.rollout import Rollout
from rltrain.arguments.hf_config import ModelShape, read_model_shape
from rltrain.run.files import read_object

GIB = 1024**3
# What CUDA, NCCL, a Python process and fragmentation take: of a GPU a tenth, of a machine 1.5 GiB a process.
_USABLE = 0.9
_PROCESS_BYTES = int(1.5 * GIB)
# SGLang's share of a GPU for weights and KV cache if --sglang-mem-fraction-static does not say.
_ENGINE_SHARE = 0.85
_CPU_KV_TOKENS = 65536  # rltrain/sglang/server.py


@dataclass(frozen=True)
class Memory:
    """Available memory: bytes of one GPU, or of the machine with `gpu` False."""

    size: float
    gpu: bool
    where: str


def read_shape(model: Model) -> ModelShape:
    """The shape of the model of `--hf-checkpoint`, which has been checked before."""
    return read_model_shape(read_object(Path(model.hf_checkpoint) / "config.json"))


def trainer_ask(config: Config) -> TrainerAsk:
    """The work of one trainer rank, from the flags."""
    sample = config.rollout.rollout_max_context_len or config.rollout.rollout_max_response_len + (
        config.rollout.rollout_max_prompt_len or 0
    )
    sample = -(-sample // config.parallel.context_parallel_size)
    # A sample that is longer than the token budget is a micro-batch of its own.
    tokens = (
        max(config.training.max_tokens_per_gpu or 0, sample)
        if config.training.use_dynamic_batch_size
        else sample * config.training.micro_batch_size
    )
    sizes = ParallelSizes.of(config.parallel)
    return TrainerAsk(
        tensor=sizes.tensor,
        data=sizes.data * sizes.context,  # the optimizer is split over both
        pipeline=sizes.pipeline,
        expert=sizes.expert * sizes.expert_tensor,
        bf16=bool(config.model.bf16),
        distributed_optimizer=bool(config.parallel.use_distributed_optimizer),
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=config.model.recompute_granularity == "full",
        tokens=tokens,
        log_probs_chunk_size=config.training.log_probs_chunk_size,
        keeps_reference=config.algorithm.use_kl_loss,
        lora_rank=config.lora.lora_rank,
    )


@dataclass(frozen=True)
class Trainer:
    """One trainer rank: its policy, and PPO's critic."""

    policy: TrainerMemory
    critic: TrainerMemory | None
    swap_critic: bool

    @classmethod
    def of(cls, config: Config, shape: ModelShape) -> Trainer:
        """The rank that the flags ask for."""
        critic = (
            critic_memory(shape, trainer_ask(config.of_critic())) if use_critic(config.algorithm) else None
        )
        return cls(trainer_memory(shape, trainer_ask(config)), critic, config.critic.swap_critic)

    def needed(self, *, gpu: bool) -> int:
        """Bytes at one time; only a GPU's memory can be swapped."""
        return both_memory(self.policy, self.critic, in_turn=gpu and self.swap_critic)

    @property
    def text(self) -> str:
        """Its parts, in words."""
        if self.critic is None:
            return describe_trainer(self.policy)
        return f"{describe_trainer(self.policy)}; critic {gib(self.critic.total)}"


def check_memory(config: Config, memory: Memory | None) -> list[Check]:
    """Checks of trainer and engines against `memory`; None if it is not known."""
    shape = read_shape(config.model)
    trainer = Trainer.of(config, shape)
    engine = None
    if not config.debug.debug_train_only:
        # An engine takes the weights' own type, which is bf16 for nearly every model; on a CPU it is fp32.
        engine = engine_memory(
            shape, config.engines.rollout_num_gpus_per_engine, bf16=memory is None or memory.gpu
        )
    if memory is None:
        return [
            ok(
                "memory",
                f"{trainer.text}; {describe_engine(engine)}; the GPUs' size is not known",
            )
        ]
    if memory.gpu:
        return _fit_gpus(config.engines, config.rollout, trainer, engine, memory)
    return [_fit_machine(config.engines, config.parallel, trainer, engine, memory)]


def _fit_gpus(
    engines: Engines, rollout: Rollout, trainer: Trainer, engine: EngineMemory | None, memory: Memory
) -> list[Check]:
    share = engines.sglang.get("mem_fraction_static", _ENGINE_SHARE)
    free = memory.size * (1 - share if engines.colocate and engine else _USABLE)
    checks = [
        _judge("trainer memory", trainer.needed(gpu=True), free, trainer.text, memory.where, _TRAINER_ADVICE)
    ]
    if engine is None:
        return checks
    tokens = engine.tokens_in(memory.size * share)
    longest = rollout.rollout_max_context_len or rollout.rollout_max_response_len
    message = f"{describe_engine(engine)}; {tokens} tokens of context fit on {memory.where}"
    if tokens < longest:
        advice = "raise --rollout-num-gpus-per-engine or --sglang-mem-fraction-static"
        return [*checks, fail("engine memory", f"{message}, but a sample may have {longest}", advice)]
    return [*checks, ok("engine memory", f"{message}, {tokens // longest} samples of full length at once")]


_TRAINER_ADVICE = (
    "more --tensor-model-parallel-size or --pipeline-model-parallel-size, --use-distributed-optimizer, --bf16,"
    " --recompute-granularity full, or fewer tokens a micro-batch (--max-tokens-per-gpu)"
)


def _fit_machine(
    engines: Engines, parallel: Parallel, trainer: Trainer, engine: EngineMemory | None, memory: Memory
) -> Check:
    ranks = parallel.actor_num_gpus_per_node
    needed = ranks * (trainer.needed(gpu=False) + _PROCESS_BYTES) + 2 * _PROCESS_BYTES
    text = f"{ranks} × {trainer.text}"
    if engine is not None:
        gpus = engines.rollout_num_gpus
        tokens = engines.sglang.get("max_total_tokens", _CPU_KV_TOKENS)
        needed += gpus * (engine.weights + tokens * engine.kv_per_token + _PROCESS_BYTES)
        text += f"; {gpus} × {describe_engine(engine)}, {tokens} tokens of context"
    return _judge("memory", needed, memory.size, text, memory.where, _TRAINER_ADVICE)


def _judge(name: str, needed: float, available: float, text: str, where: str, advice: str) -> Check:
    message = f"{text}: {gib(needed)} of {gib(available)} usable on {where}"
    if needed > available:
        return fail(name, message, advice)
    if needed > 0.85 * available:
        return warn(name, f"{message}, which is close", advice)
    return ok(name, message)


def describe_trainer(memory: TrainerMemory) -> str:
    """Its parts, in words."""
    state = f"weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, Adam {gib(memory.optimizer)}"
    return f"trainer rank: {state}, activations and logits about {gib(memory.activations + memory.logits)}"


def describe_engine(memory: EngineMemory | None) -> str:
    """Its parts, in words."""
    if memory is None:
        return "no engines"
    return f"engine: weights {gib(memory.weights)}, {memory.kv_per_token / 1024:.0f} KiB a token of context"


def gib(size: float) -> str:
    """Bytes as GiB, or as MiB where that says more."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 1024**2:.1f} MiB"
