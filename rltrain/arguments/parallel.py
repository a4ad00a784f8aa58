"""How the trainer's ranks are split: which sizes fit together, and what is nearest where they don't. Torch-free.

Ranks = tensor × pipeline × context × data. Experts are split over the same ranks of one pipeline stage in
another way: expert tensor × expert × expert data = tensor × context × data.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import product

from rltrain.arguments.errors import UserError


@dataclass(frozen=True)
class ParallelSizes:
    """Sizes of all parallel dimensions. Those of experts are 1 where nothing was asked for."""

    world: int
    tensor: int
    pipeline: int
    context: int
    expert: int
    expert_tensor: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> ParallelSizes:
        """The sizes that the flags ask for; they need not fit together."""
        return cls(
            world=args.actor_num_nodes * args.actor_num_gpus_per_node,
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        )

    @property
    def model(self) -> int:
        """Ranks that hold one copy of the dense weights and work on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data parallel size."""
        return self.world // self.model


def check_parallel(args: argparse.Namespace) -> None:
    """Refuse sizes that don't multiply to the number of trainer ranks.

    Raises:
        UserError: names the flags, the ranks, and the nearest sizes that fit.
    """
    sizes = ParallelSizes.of(args)
    _at_least_one(args)
    ranks = (
        f"{sizes.world} trainer ranks (--actor-num-nodes {args.actor_num_nodes} × --actor-num-gpus-per-node"
        f" {args.actor_num_gpus_per_node})"
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
    _check_virtual_stages(args)


def virtual_stages(args: argparse.Namespace, num_layers: int) -> int | None:
    """Parts of the model on each pipeline rank; None without --num-…-virtual-… flags.

    Raises:
        UserError: the layers cannot be shared out as asked.
    """
    pipeline = args.pipeline_model_parallel_size
    stages = args.num_virtual_stages_per_pipeline_rank
    flag = f"--num-virtual-stages-per-pipeline-rank {stages}"
    if per_stage := args.num_layers_per_virtual_pipeline_stage:
        flag = f"--num-layers-per-virtual-pipeline-stage {per_stage}"
        stages, rest = divmod(num_layers, pipeline * per_stage)
        if rest or not stages:
            raise UserError(
                f"{flag} × --pipeline-model-parallel-size {pipeline} = {pipeline * per_stage} does not divide the"
                f" model's {num_layers} layers. Use one of {_choices(num_layers, pipeline)}."
            )
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if pipeline > 1 and not uneven and num_layers % (pipeline * (stages or 1)):
        parts = f"--pipeline-model-parallel-size {pipeline}" + (f" × {flag}" if stages else "")
        raise UserError(
            f"{parts} does not divide the model's {num_layers} layers. Pipeline sizes that do:"
            f" {', '.join(map(str, _divisors(num_layers)))}; --decoder-first-pipeline-num-layers and"
            " --decoder-last-pipeline-num-layers make uneven stages."
        )
    if uneven:
        _check_uneven(args, num_layers)
    return stages if stages and stages > 1 else None


def _check_uneven(args: argparse.Namespace, num_layers: int) -> None:
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    middle = args.pipeline_model_parallel_size - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if middle < 0 or rest < middle or (rest % middle if middle else rest):
        raise UserError(
            f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} leave"
            f" {rest} of the model's {num_layers} layers for {middle} further pipeline stages of"
            f" --pipeline-model-parallel-size {args.pipeline_model_parallel_size}: these must get equal shares."
        )


def _check_virtual_stages(args: argparse.Namespace) -> None:
    virtual = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
    if args.num_virtual_stages_per_pipeline_rank and args.num_layers_per_virtual_pipeline_stage:
        raise UserError(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage say the same"
            " thing: give one of them."
        )
    if virtual and args.pipeline_model_parallel_size == 1:
        raise UserError("virtual pipeline stages need --pipeline-model-parallel-size of at least 2.")
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if uneven and (virtual or args.pipeline_model_parallel_size == 1):
        raise UserError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need"
            " --pipeline-model-parallel-size of at least 2, and no virtual stages."
        )


def _at_least_one(args: argparse.Namespace) -> None:
    for name in ("actor_num_nodes", "actor_num_gpus_per_node", "tensor_model_parallel_size",
                 "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
                 "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank",
                 "num_layers_per_virtual_pipeline_stage"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")


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
