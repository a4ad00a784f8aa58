"""How the trainer's ranks are split: the flags, which sizes fit together, and the nearest that do.

Ranks = tensor × pipeline × context × data. Experts are split over the same ranks of one pipeline stage in
another way: expert tensor × expert × expert data = tensor × context × data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

from rltrain.arguments.declare import flag
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Parallel:
    """Parallelism."""

    actor_num_nodes: int = flag("trainer nodes (default: 1)", 1, metavar="N", at_least=1)
    actor_num_gpus_per_node: int = flag(
        "trainer ranks per node: one per GPU, or processes on a CPU (default: on Slurm a node's GPUs, else 1)",
        1,
        metavar="N",
        at_least=1,
    )
    num_gpus_per_node: int = flag("GPUs of each node that a Slurm job uses (default: all)", 8, metavar="N")
    distributed_backend: Literal["nccl", "gloo"] | None = flag(
        "backend of torch.distributed (default: nccl with CUDA, else gloo)"
    )
    distributed_timeout_minutes: int = flag("timeout of a collective (default: 10)", 10, metavar="MIN")
    tensor_model_parallel_size: int = flag("default: 1", 1, metavar="N", at_least=1, owner="Megatron")
    pipeline_model_parallel_size: int = flag("default: 1", 1, metavar="N", at_least=1, owner="Megatron")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        "layers of a virtual stage: each pipeline rank holds several, for shorter bubbles",
        metavar="N",
        at_least=1,
        owner="Megatron",
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        "the same, as the number of virtual stages on a rank", metavar="N", at_least=1, owner="Megatron"
    )
    decoder_first_pipeline_num_layers: int | None = flag(
        "for uneven pipeline stages", metavar="N", owner="Megatron"
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        "for uneven pipeline stages", metavar="N", owner="Megatron"
    )
    sequence_parallel: bool = flag(
        "split activations over tensor parallel ranks too", False, owner="Megatron"
    )
    context_parallel_size: int = flag(
        "ranks that share each sequence (default: 1)", 1, metavar="N", at_least=1, owner="Megatron"
    )
    expert_model_parallel_size: int = flag(
        "ranks that share the experts (default: 1)", 1, metavar="N", at_least=1, owner="Megatron"
    )
    expert_tensor_parallel_size: int | None = flag(
        "ranks that share an expert (default: --tensor-model-parallel-size)",
        metavar="N",
        at_least=1,
        owner="Megatron",
    )
    use_distributed_optimizer: bool = flag(
        "shard optimizer state over data parallel ranks (default: with GPUs)", owner="Megatron"
    )

    @property
    def num_ranks(self) -> int:
        """Ranks of the trainer, on all nodes."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of all parallel dimensions. Those of experts default to 1."""

    world: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int

    @classmethod
    def of(cls, parallel: Parallel) -> ParallelSizes:
        """The sizes that the flags ask for; they need not fit together."""
        return cls(
            world=parallel.num_ranks,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
            expert=parallel.expert_model_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        )

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the dense weights and work on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data parallel size."""
        return self.world // self.model


def check_parallel(parallel: Parallel) -> None:
    """Refuse sizes that don't multiply to the number of trainer ranks.

    Raises:
        UserError: names the flags, the ranks, and the nearest sizes that fit.
    """
    sizes = ParallelSizes.of(parallel)
    ranks = (
        f"{sizes.world} trainer ranks (--actor-num-nodes {parallel.actor_num_nodes} × --actor-num-gpus-per-node"
        f" {parallel.actor_num_gpus_per_node})"
    )
    if sizes.world % sizes.model:
        raise UserError(
            f"--tensor-model-parallel-size {sizes.tensor} × --pipeline-model-parallel-size {sizes.pipeline} ×"
            f" --context-parallel-size {sizes.context} = {sizes.model} does not divide the {ranks}."
            f" Nearest that does: {_nearest_model_sizes(sizes)}; or {_nearest_multiples(sizes)} ranks."
        )
    stage = sizes.world // sizes.pipeline
    if stage % (sizes.expert * sizes.expert_tensor):
        fitting = [n for n in _divisors(stage) if stage % (n * sizes.expert_tensor) == 0]
        nearest = min(fitting, key=lambda n: abs(math.log(n / sizes.expert)), default=1)
        raise UserError(
            f"--expert-model-parallel-size {sizes.expert} × --expert-tensor-parallel-size {sizes.expert_tensor} ="
            f" {sizes.expert * sizes.expert_tensor} does not divide the {stage} ranks of a pipeline stage: {ranks}"
            f" / --pipeline-model-parallel-size {sizes.pipeline}. Nearest that does:"
            f" --expert-model-parallel-size {nearest}."
        )
    _check_virtual_stages(parallel)


def virtual_stages(parallel: Parallel, num_layers: int) -> int | None:
    """Parts of the model on each pipeline rank; None without --num-…-virtual-… flags.

    Raises:
        UserError: the layers can't be split in this way.
    """
    pipeline = parallel.pipeline_model_parallel_size
    stages = parallel.num_virtual_stages_per_pipeline_rank
    flag = f"--num-virtual-stages-per-pipeline-rank {stages}"
    if per_stage := parallel.num_layers_per_virtual_pipeline_stage:
        flag = f"--num-layers-per-virtual-pipeline-stage {per_stage}"
        stages, rest = divmod(num_layers, pipeline * per_stage)
        if rest or not stages:
            raise UserError(
                f"{flag} × --pipeline-model-parallel-size {pipeline} = {pipeline * per_stage} does not divide the"
                f" model's {num_layers} layers. Use one of {_choices(num_layers, pipeline)}."
            )
    uneven = parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers
    if pipeline > 1 and not uneven and num_layers % (pipeline * (stages or 1)):
        parts = f"--pipeline-model-parallel-size {pipeline}" + (f" × {flag}" if stages else "")
        raise UserError(
            f"{parts} does not divide the model's {num_layers} layers. Pipeline sizes that do:"
            f" {', '.join(map(str, _divisors(num_layers)))}; --decoder-first-pipeline-num-layers and"
            " --decoder-last-pipeline-num-layers make uneven stages."
        )
    if uneven:
        _check_uneven(parallel, num_layers)
    return stages if stages and stages > 1 else None


def _check_uneven(parallel: Parallel, num_layers: int) -> None:
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    middle = parallel.pipeline_model_parallel_size - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if middle < 0 or rest < middle or (rest % middle if middle else rest):
        raise UserError(
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} leave"
            f" {rest} of the model's {num_layers} layers for {middle} further pipeline stages of"
            f" --pipeline-model-parallel-size {parallel.pipeline_model_parallel_size}: these must get equal shares."
        )


def _check_virtual_stages(parallel: Parallel) -> None:
    virtual = parallel.num_virtual_stages_per_pipeline_rank or parallel.num_layers_per_virtual_pipeline_stage
    if parallel.num_virtual_stages_per_pipeline_rank and parallel.num_layers_per_virtual_pipeline_stage:
        raise UserError(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage say the same"
            " thing: give one of them."
        )
    if virtual and parallel.pipeline_model_parallel_size == 1:
        raise UserError("virtual pipeline stages need --pipeline-model-parallel-size of at least 2.")
    uneven = parallel.decoder_first_pipeline_num_layers or parallel.decoder_last_pipeline_num_layers
    if uneven and (virtual or parallel.pipeline_model_parallel_size == 1):
        raise UserError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need"
            " --pipeline-model-parallel-size of at least 2, and no virtual stages."
        )


def _nearest_model_sizes(sizes: ParallelSizes) -> str:
    """Tensor, pipeline and context sizes that divide the ranks, changed as little as can be."""
    wanted = (sizes.tensor, sizes.pipeline, sizes.context)
    divisors = _divisors(sizes.world)
    fitting = (each for each in product(divisors, repeat=3) if sizes.world % math.prod(each) == 0)
    tensor, pipeline, context = min(
        fitting, key=lambda each: sum(abs(math.log(a / b)) for a, b in zip(each, wanted, strict=True))
    )
    return (
        f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}"
        f" --context-parallel-size {context}"
    )


def _nearest_multiples(sizes: ParallelSizes) -> str:
    below = sizes.world // sizes.model * sizes.model
    return " or ".join(str(n) for n in (below, below + sizes.model) if n)


def _choices(num_layers: int, pipeline: int) -> str:
    fitting = [n for n in _divisors(num_layers) if num_layers % (n * pipeline) == 0]
    return ", ".join(map(str, fitting)) or "none: the pipeline size itself does not divide the layers"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
