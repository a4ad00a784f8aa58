"""What the policy's loss needs beside the rollout itself: log-probs of other policies, and advantages."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from rltrain.data.trainable import Flat
from rltrain.megatron.advantages import advantages
from rltrain.megatron.other_policies import OtherPolicies
from rltrain.megatron.rank_share import RankShare
from rltrain.timing import Timers

LogProbs = Callable[[RankShare, str], Flat]


def check_rollout(args: argparse.Namespace, share: RankShare) -> None:
    """See that a rollout brings what the flags need of it.

    Raises:
        ValueError: names the flag and what is missing.
    """
    needs_engine = {"--use-tis": args.use_tis, "--use-rollout-logprobs": args.use_rollout_logprobs,
                    "--get-mismatch-metrics": args.get_mismatch_metrics}  # fmt: skip
    for flag, given in needs_engine.items():
        if given and share.batch.rollout_log_probs is None:
            raise ValueError(f"{flag}, but the rollout has no log-probs")
    if args.opd_type == "sglang" and share.batch.teacher_log_probs is None:
        raise ValueError(
            "--opd-type sglang, but the samples have no teacher_log_probs: the reward function or the generate"
            " function has to set them, one a response token"
        )


def add_log_probs(
    args: argparse.Namespace,
    values: dict[str, Flat],
    share: RankShare,
    models: list[GPTModel],
    log_probs: LogProbs,
    others: OtherPolicies,
    rollout_id: int,
    timers: Timers,
) -> None:
    """Add `ref_log_probs`, `teacher_log_probs` and `old_log_probs`, as far as the flags need them.

    Args:
        log_probs: Those of the weights that the models have then; it is given slime's prefix too.
    """
    if others.reference is not None:
        with timers("ref_log_probs"), others.reference.in_place_of(models):
            values["ref_log_probs"] = log_probs(share, "ref_")
    if others.teacher is not None:
        with timers("teacher_log_probs"), others.teacher.in_place_of(models):
            values["teacher_log_probs"] = log_probs(share, "teacher_")
    elif share.batch.teacher_log_probs is not None:
        values["teacher_log_probs"] = share.trainable.select(share.batch.teacher_log_probs)
    past = others.past.that_generated(rollout_id) if others.past is not None else None
    if args.use_rollout_logprobs:
        values["old_log_probs"] = values["rollout_log_probs"]
    elif past is not None:
        with timers("log_probs"), past.in_place_of(models):
            values["old_log_probs"] = log_probs(share, "")
    elif share.num_steps > 1 or _needs_own_log_probs(args):
        with timers("log_probs"):
            values["old_log_probs"] = log_probs(share, "")


def add_advantages(args: argparse.Namespace, values: dict[str, Flat], share: RankShare) -> None:
    """Add the advantages and what comes with them; see `advantages.advantages`."""
    if args.compute_advantages_and_returns:
        values |= advantages(args, share, values, parallel_state.get_data_parallel_group())
    known_before = args.use_rollout_logprobs or args.keep_old_actor or args.loss_type == "custom_loss"
    if share.num_steps == 1 and not known_before:
        # The current log-probs, see `loss.policy_token_loss`: exactly, whatever the micro-batches were.
        values.pop("old_log_probs", None)


def _needs_own_log_probs(args: argparse.Namespace) -> bool:
    """Whether something before the first optimizer step asks for the policy's log-probs."""
    return bool(
        args.kl_coef or args.custom_advantage_function_path or args.use_opd or args.loss_type == "custom_loss"
    )
