"""The Megatron flags that this version takes, with Megatron's names, defaults and meaning.

The model's shape is not among them: it comes from the Hugging Face configuration.
"""

from __future__ import annotations

import argparse


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add parallelism, optimizer, schedule, precision and recomputation."""
    _parallel(parser.add_argument_group("megatron: parallelism"))
    _optimizer(parser.add_argument_group("megatron: optimizer"))
    _memory(parser.add_argument_group("megatron: precision and memory"))


def _parallel(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="default: 1")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="only 1 so far")
    add("--sequence-parallel", action="store_true", help="split activations over tensor parallel ranks too")
    add(
        "--use-distributed-optimizer",
        action="store_true",
        help="shard optimizer state over data parallel ranks",
    )


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
