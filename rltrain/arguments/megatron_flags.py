"""The Megatron flags that this version takes, with Megatron's names, defaults and meaning.

The model's shape is not among them: it comes from the Hugging Face configuration.
"""

from __future__ import annotations

import argparse

from rltrain.arguments.errors import UserError


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add parallelism, optimizer, schedule, precision and recomputation."""
    _parallel(parser.add_argument_group("megatron: parallelism"))
    _experts(parser.add_argument_group("megatron: mixture of experts"))
    _optimizer(parser.add_argument_group("megatron: optimizer"))
    _memory(parser.add_argument_group("megatron: precision and memory"))


def _parallel(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="default: 1")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="default: 1")
    add("--num-layers-per-virtual-pipeline-stage", type=int, metavar="N",
        help="layers of a virtual stage: each pipeline rank holds several, for shorter bubbles")  # fmt: skip
    add("--num-virtual-stages-per-pipeline-rank", type=int, metavar="N", help="the same, by their number")
    add("--decoder-first-pipeline-num-layers", type=int, metavar="N", help="for uneven pipeline stages")
    add("--decoder-last-pipeline-num-layers", type=int, metavar="N", help="for uneven pipeline stages")
    add("--sequence-parallel", action="store_true", help="split activations over tensor parallel ranks too")
    add("--context-parallel-size", type=int, default=1, metavar="N",
        help="ranks that share each sequence (default: 1)")  # fmt: skip
    add("--expert-model-parallel-size", type=int, default=1, metavar="N",
        help="ranks that share the experts (default: 1)")  # fmt: skip
    add("--expert-tensor-parallel-size", type=int, metavar="N",
        help="ranks that share an expert (default: --tensor-model-parallel-size)")  # fmt: skip
    add(
        "--use-distributed-optimizer",
        action="store_true",
        help="shard optimizer state over data parallel ranks",
    )


def _experts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--moe-token-dispatcher-type", choices=["alltoall", "allgather", "flex"], default="alltoall",
        help="how tokens reach their experts; flex needs GPUs and DeepEP (default: alltoall)")  # fmt: skip
    add("--moe-router-load-balancing-type", choices=["aux_loss", "seq_aux_loss", "global_aux_loss", "none"],
        default="aux_loss", help="default: aux_loss, with --moe-aux-loss-coeff")  # fmt: skip
    add("--moe-aux-loss-coeff", type=float, default=0.0, metavar="C", help="default: 0, off")


def _optimizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--optimizer", choices=["adam", "sgd"], default="adam",
        help="default: adam (with decoupled weight decay)")  # fmt: skip
    add("--lr", type=float, default=1e-6, metavar="LR", help="default: 1e-6, as slime")
    add("--min-lr", type=float, default=0.0, metavar="LR", help="where the decay ends (default: 0)")
    add("--lr-decay-style", choices=["constant", "linear", "cosine", "inverse-square-root", "WSD"], default="constant",
        help="default: constant")  # fmt: skip
    add("--lr-warmup-iters", type=int, default=0, metavar="N", help="optimizer steps (default: 0)")
    add("--lr-warmup-fraction", type=float, metavar="F", help="instead: share of the schedule's steps")
    add(
        "--lr-warmup-init",
        type=float,
        default=0.0,
        metavar="LR",
        help="where the warm-up begins (default: 0)",
    )
    add("--lr-wsd-decay-style", choices=["exponential", "linear", "cosine", "minus_sqrt"], default="exponential",
        help="of WSD's last part (default: exponential)")  # fmt: skip
    add("--lr-wsd-decay-iters", type=int, metavar="N", help="optimizer steps of WSD's last part")
    add("--lr-decay-iters", type=int, metavar="N", help="optimizer steps (default: all)")
    add("--weight-decay", type=float, default=0.01, metavar="W", help="default: 0.01")
    add("--start-weight-decay", type=float, metavar="W", help="of a weight decay that changes")
    add("--end-weight-decay", type=float, metavar="W", help="of a weight decay that changes")
    add("--weight-decay-incr-style", choices=["constant", "linear", "cosine"], default="constant",
        help="how it changes (default: constant)")  # fmt: skip
    add("--adam-beta1", type=float, default=0.9, metavar="B", help="default: 0.9")
    add("--adam-beta2", type=float, default=0.999, metavar="B", help="default: 0.999")
    add("--adam-eps", type=float, default=1e-8, metavar="E", help="default: 1e-8")
    add("--clip-grad", type=float, default=1.0, metavar="NORM", help="largest gradient norm (default: 1.0)")
    add("--seed", type=int, default=1234, metavar="SEED", help="default: 1234")


def _memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--bf16", action="store_true", help="bf16 weights with fp32 master weights (default: fp32)")
    add(
        "--recompute-granularity",
        choices=["full", "selective"],
        help="recompute activations in the backward pass",
    )
    add("--recompute-method", choices=["uniform", "block"], help="with full recomputation")
    add("--recompute-num-layers", type=int, metavar="N", help="with full recomputation")


def resolve_schedule(args: argparse.Namespace) -> None:
    """Refuse schedules that can't be right.

    Raises:
        UserError: names the flags.
    """
    if args.lr_warmup_fraction is not None and args.lr_warmup_iters:
        raise UserError("--lr-warmup-fraction and --lr-warmup-iters say the same thing: give one of them.")
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        raise UserError(f"--lr-warmup-fraction {args.lr_warmup_fraction}: it is between 0 and 1.")
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters: the steps of its last part.")
    weight_decays = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style != "constant" and None in weight_decays:
        raise UserError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and"
            " --end-weight-decay."
        )
    if args.weight_decay_incr_style == "constant" and weight_decays != (None, None):
        raise UserError(
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine."
        )
