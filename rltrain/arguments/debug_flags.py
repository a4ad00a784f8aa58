"""Flags that run half of a job: rollouts without a trainer, or a trainer on rollouts that were recorded before."""

from __future__ import annotations

import argparse
from pathlib import Path

from rltrain.arguments.errors import UserError

_RECORDED = "rltrain.rollout.recorded"


def add_debug_flags(group: argparse._ArgumentGroup) -> None:
    """Add them."""
    add = group.add_argument
    add("--debug-train-only", action="store_true",
        help="no engines: the rollout function makes the data alone")  # fmt: skip
    add("--debug-rollout-only", action="store_true",
        help="no trainer: generate and grade with the weights of --hf-checkpoint")  # fmt: skip
    add("--save-debug-rollout-data", metavar="FILE",
        help="also write every rollout there; {rollout_id} in it stands for the rollout's number")  # fmt: skip
    add("--save-debug-train-data", metavar="FILE",
        help="write what each rank trained on, with all inputs of the loss; {rollout_id} and {rank} in it")  # fmt: skip
    add("--load-debug-rollout-data", metavar="FILE",
        help="no engines: train on rollouts that were recorded, from files named so")  # fmt: skip
    add("--load-debug-rollout-data-subsample", type=float, metavar="F", help="on this share of their groups")


def resolve_debug(args: argparse.Namespace) -> None:
    """Resolve in place.

    Raises:
        UserError: names the flags that contradict each other, or a file name that can't be one.
    """
    for name in ("save_debug_rollout_data", "load_debug_rollout_data"):
        template = getattr(args, name)
        if template is not None:
            _check_template(f"--{name.replace('_', '-')}", template)
            setattr(args, name, str(Path(template).expanduser().absolute()))
    _check_train_data(args)
    if args.load_debug_rollout_data:
        args.debug_train_only = True
        args.rollout_function_path = f"{_RECORDED}.generate_rollout"
        args.data_source_path = f"{_RECORDED}.NoPrompts"
    share = args.load_debug_rollout_data_subsample
    if share is not None and not (args.load_debug_rollout_data and 0 < share <= 1):
        raise UserError(
            f"--load-debug-rollout-data-subsample {share:g}: it is a share greater than 0 and at most 1, of the"
            " groups in --load-debug-rollout-data."
        )
    if args.debug_rollout_only:
        _rollout_only(args)


def _check_train_data(args: argparse.Namespace) -> None:
    template = args.save_debug_train_data
    if template is None:
        return
    try:
        names = {template.format(rollout_id=i, rank=j) for i in (0, 1) for j in (0, 1)}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"--save-debug-train-data {template}: only {{rollout_id}} and {{rank}} may stand in braces ({error})."
        ) from None
    if len(names) < 4 or not template.endswith(".parquet"):
        raise UserError(
            f"--save-debug-train-data {template}: the name must have {{rollout_id}} and {{rank}} in it, or one file"
            " would replace another, and end in .parquet."
        )
    args.save_debug_train_data = str(Path(template).expanduser().absolute())


def check_recorded(args: argparse.Namespace) -> None:
    """See that every rollout of the run has been recorded.

    Raises:
        UserError: names the first file that is missing.
    """
    for rollout_id in range(args.num_rollout):
        path = Path(args.load_debug_rollout_data.format(rollout_id=rollout_id))
        if not path.is_file():
            raise UserError(
                f"--load-debug-rollout-data: there is no {path}, for rollout {rollout_id} of --num-rollout"
                f" {args.num_rollout}."
            )


def _rollout_only(args: argparse.Namespace) -> None:
    if args.debug_train_only:
        raise UserError(
            "--debug-rollout-only has no trainer, and --debug-train-only or --load-debug-rollout-data no engines:"
            " leave one of them out."
        )
    if args.random_init:
        raise UserError(
            "--debug-rollout-only: engines generate with the weights of --hf-checkpoint, and --random-init has none."
        )


def _check_template(flag: str, template: str) -> None:
    try:
        names = {template.format(rollout_id=number) for number in (0, 1)}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{flag} {template}: only {{rollout_id}} may stand in braces, as in {{rollout_id:06d}} ({error})."
        ) from None
    if not template.endswith(".parquet"):
        raise UserError(
            f"{flag} {template}: rollouts are Parquet files here, so let the name end in .parquet."
        )
    if flag.startswith("--save") and len(names) == 1:
        raise UserError(
            f"{flag} {template}: without {{rollout_id}} in it every rollout would replace the last."
        )
