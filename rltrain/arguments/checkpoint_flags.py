"""Flags of the model and of checkpoints; docs/checkpoints.md."""

from __future__ import annotations

import argparse

from rltrain.arguments.errors import UserError


def add_checkpoint_flags(group: argparse._ArgumentGroup) -> None:
    """Add them to a group of the parser."""
    add = group.add_argument
    add("--hf-checkpoint", metavar="DIR", help="Hugging Face directory: shape, tokenizer and first weights")
    add("--random-init", action="store_true", help="start from random weights (seed: --seed)")
    add("--load", metavar="DIR", help="checkpoints or Hugging Face directory to start from")
    add("--ref-load", metavar="DIR", help="weights of the reference model (default: the first weights)")
    add("--save", metavar="DIR", help="where checkpoints go (default: checkpoints/ of the run)")
    add(
        "--ref-ckpt-step",
        type=int,
        metavar="N",
        help="of --ref-load: take this checkpoint and not the latest",
    )
    add("--finetune", action="store_true", help="take only the weights of --load, and begin at rollout 0")
    add("--save-interval", type=int, metavar="N", help="rollouts between two checkpoints")
    add("--save-hf", metavar="DIR", help="also write Hugging Face weights at the end")
    add("--no-save-optim", action="store_true", help="checkpoints without optimizer state")
    add("--no-save-rng", action="store_true", help="checkpoints without the random number generators' states")
    add("--no-load-rng", action="store_true", help="do not restore the random number generators")
    add("--async-save", action="store_true", help="write checkpoints while training goes on")
    add("--ckpt-format", choices=["torch_dist", "torch"], default="torch_dist",
        help="torch_dist fits any parallel layout (default); torch only the one that it was saved with")  # fmt: skip
    add(
        "--keep-last-k",
        type=int,
        metavar="K",
        help="remove all but the newest K checkpoints (default: keep all)",
    )
    add("--save-retain-interval", type=int, metavar="N",
        help="keep those of every N rollouts, and the newest")  # fmt: skip
    add("--no-load-optim", action="store_true", help="ignore the optimizer state of --load")
    add("--ckpt-step", type=int, metavar="N", help="take this checkpoint and not the latest")


def resolve_checkpoints(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself.

    Raises:
        UserError: names the flags.
    """
    if args.async_save and args.ckpt_format == "torch":
        raise UserError("--async-save writes --ckpt-format torch_dist only: leave one of them out.")
    if args.save_interval and (interval := args.save_retain_interval) and interval % args.save_interval:
        raise UserError(
            f"--save-retain-interval {interval} is no multiple of --save-interval {args.save_interval}: there is no"
            " checkpoint of such a rollout."
        )
    if args.ckpt_step is not None and args.load is None:
        raise UserError("--ckpt-step says which checkpoint of --load to take: give --load.")
    if args.ckpt_step is not None and args.load == args.save:
        raise UserError(
            f"--ckpt-step {args.ckpt_step}: --load is where this run saves, and a restart has to go on from its newest"
            " checkpoint. Give another --save."
        )
    if args.ref_ckpt_step is not None and args.ref_load is None:
        raise UserError("--ref-ckpt-step says which checkpoint of --ref-load to take: give --ref-load.")
