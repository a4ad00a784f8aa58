"""slime's flags of the algorithm: what the loss is, and what the advantage is made of; docs/algorithms.md."""

from __future__ import annotations

import argparse

from rltrain.arguments.critic_flags import resolve_critic
from rltrain.arguments.errors import UserError

ESTIMATORS = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
_WITH_KL_IN_REWARD = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
_DISCOUNTING = ("reinforce_plus_plus", "ppo")


def add_algorithm_flags(group: argparse._ArgumentGroup) -> None:
    """Add them to a group of the parser."""
    _loss(group)
    _advantage(group)
    _kl(group)
    _mismatch(group)
    _distillation(group)


def _loss(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--loss-type", choices=["policy_loss", "sft_loss", "custom_loss"], default="policy_loss",
        help="default: policy_loss")  # fmt: skip
    add("--custom-loss-function-path", metavar="PATH",
        help="with custom_loss: function(args, batch, logits, sum_of_sample_mean) that returns the loss and metrics"
        )  # fmt: skip
    add("--eps-clip", type=float, default=0.2, metavar="E", help="PPO clip range (default: 0.2)")
    add("--eps-clip-high", type=float, metavar="E", help="upper clip range (default: --eps-clip)")
    add("--eps-clip-c", type=float, metavar="C", help="dual clip for negative advantages, > 1")
    add("--entropy-coef", type=float, default=0.0, metavar="C", help="entropy bonus (default: 0)")
    add("--calculate-per-token-loss", action="store_true", help="mean over all tokens, not over samples")
    add("--custom-pg-loss-reducer-function-path", metavar="PATH",
        help="function(total_lengths, response_lengths, loss_masks, calculate_per_token_loss) that returns"
        " another reduction of the policy loss")  # fmt: skip


def _advantage(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--advantage-estimator", choices=ESTIMATORS, default="grpo", help="default: grpo")
    add("--disable-grpo-std-normalization", action="store_false", dest="grpo_std_normalization",
        help="do not divide by the group's standard deviation (Dr.GRPO)")  # fmt: skip
    add("--disable-rewards-normalization", action="store_false", dest="rewards_normalization",
        help="train on the rewards as graded")  # fmt: skip
    add("--normalize-advantages", action="store_true", help="whiten them over all tokens of the rollout")
    add("--gamma", type=float, default=1.0, metavar="G",
        help="discount of ppo and reinforce_plus_plus (default: 1)")  # fmt: skip
    add("--lambd", type=float, default=1.0, metavar="L", help="λ of ppo's GAE (default: 1)")
    add("--disable-compute-advantages-and-returns", action="store_false", dest="compute_advantages_and_returns",
        help="compute none: for a custom loss that needs none")  # fmt: skip
    add("--custom-advantage-function-path", metavar="PATH",
        help="function(args, rollout_data) that sets rollout_data['advantages']")  # fmt: skip


def _kl(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--kl-coef", type=float, default=0.0, metavar="B", help="KL to the reference taken off the reward")
    add("--use-kl-loss", action="store_true", help="KL to the reference as a term of the loss")
    add("--kl-loss-coef", type=float, default=0.0, metavar="B", help="its weight (default: 0)")
    add("--kl-loss-type", choices=["k1", "k2", "k3", "low_var_kl"], default="k1",
        help="estimator (default: k1)")  # fmt: skip
    add("--ref-update-interval", type=int, metavar="N",
        help="rollouts after which the reference becomes what the policy is then (default: never)")  # fmt: skip
    add("--use-unbiased-kl", action="store_true", help="weigh it with π/π_old, for several steps a rollout")


def _mismatch(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-rollout-logprobs", action="store_true", help="take the engine's log-probs as the old ones")
    add("--keep-old-actor", action="store_true",
        help="take the log-probs of the weights that generated the rollout as the old ones")  # fmt: skip
    add("--use-opsm", action="store_true",
        help="leave out bad responses that the policy would hardly write any more")  # fmt: skip
    add("--opsm-delta", type=float, default=1e-4, metavar="D",
        help="their mean log π_old − log π is greater than this (default: 1e-4)")  # fmt: skip
    add("--get-mismatch-metrics", action="store_true", help="the metrics of --use-tis without its correction")
    add("--use-tis", action="store_true", help="weigh the loss with trainer's over engine's probability")
    add("--tis-clip", type=float, default=2.0, metavar="W", help="largest weight (default: 2)")
    add("--tis-clip-low", type=float, default=0.0, metavar="W", help="smallest weight (default: 0)")
    add("--custom-tis-function-path", metavar="PATH",
        help="another correction, such as rltrain.algorithms.mismatch.icepop")  # fmt: skip


def _distillation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-opd", action="store_true", help="on-policy distillation: a teacher grades every token")
    add("--opd-type", choices=["sglang", "megatron"],
        help="who has the teacher: the rollout, as teacher_log_probs of its samples, or the trainer")  # fmt: skip
    add("--opd-kl-coef", type=float, default=1.0, metavar="C",
        help="weight of log π − log π_teacher, taken off the advantage (default: 1)")  # fmt: skip
    add("--opd-teacher-load", metavar="DIR", help="with megatron: the teacher, of the policy's shape")
    add("--opd-teacher-ckpt-step", type=int, metavar="N", help="take this checkpoint of it, not the latest")


def resolve_algorithm(args: argparse.Namespace) -> None:
    """Fill in what follows from other flags, and refuse what can't be right.

    Raises:
        UserError: names the flags that contradict each other, with their values.
    """
    if args.eps_clip_high is None:
        args.eps_clip_high = args.eps_clip
    if args.eps_clip_c is not None and args.eps_clip_c <= 1:
        raise UserError(f"--eps-clip-c {args.eps_clip_c}: the dual clip must be greater than 1.")
    if args.eps_clip_c is not None and args.advantage_estimator == "cispo":
        raise UserError("--eps-clip-c: CISPO's loss has no dual clip; leave it out.")
    estimator = f"--advantage-estimator {args.advantage_estimator}"
    if args.kl_coef and args.advantage_estimator not in _WITH_KL_IN_REWARD and not _custom(args):
        raise UserError(
            f"--kl-coef {args.kl_coef}: {estimator} takes the KL to the reference as a loss, not out of the"
            f" reward. Use --use-kl-loss --kl-loss-coef instead, or one of {', '.join(_WITH_KL_IN_REWARD)}."
        )
    for flag, value in (("--gamma", args.gamma), ("--lambd", args.lambd)):
        if not 0 <= value <= 1:
            raise UserError(f"{flag} {value}: a discount is between 0 and 1.")
    if args.gamma != 1 and args.advantage_estimator not in _DISCOUNTING and not _custom(args):
        raise UserError(
            f"--gamma {args.gamma}: {estimator} discounts nothing; {' and '.join(_DISCOUNTING)} do."
        )
    if args.lambd != 1 and args.advantage_estimator != "ppo" and not _custom(args):
        raise UserError(f"--lambd {args.lambd}: {estimator} has no critic to look ahead with; ppo has one.")
    if args.use_unbiased_kl and not args.use_kl_loss:
        raise UserError("--use-unbiased-kl changes the KL loss: it needs --use-kl-loss.")
    if args.ref_update_interval is not None and args.ref_update_interval < 1:
        raise UserError(f"--ref-update-interval {args.ref_update_interval}: it must be at least 1.")
    if args.ref_update_interval is not None and not (args.use_kl_loss or args.kl_coef):
        raise UserError("--ref-update-interval: nothing uses a reference; add --use-kl-loss or --kl-coef.")
    _resolve_loss(args)
    _resolve_mismatch(args)
    _resolve_distillation(args)
    resolve_critic(args)


def _resolve_loss(args: argparse.Namespace) -> None:
    custom = args.loss_type == "custom_loss"
    if custom != bool(args.custom_loss_function_path):
        raise UserError("--loss-type custom_loss and --custom-loss-function-path belong together.")
    if not args.compute_advantages_and_returns and not custom:
        raise UserError("--disable-compute-advantages-and-returns: only a custom loss can do without.")


def _resolve_distillation(args: argparse.Namespace) -> None:
    if not args.use_opd:
        for name in ("opd_type", "opd_teacher_load", "opd_teacher_ckpt_step"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: it needs --use-opd.")
        return
    if args.opd_type is None:
        raise UserError("--use-opd needs --opd-type: sglang or megatron.")
    if (args.opd_type == "megatron") != (args.opd_teacher_load is not None):
        raise UserError(
            "--opd-teacher-load and --opd-type megatron belong together; with sglang the samples bring"
            " teacher_log_probs."
        )
    if args.loss_type == "sft_loss":
        raise UserError("--use-opd grades the model's own responses; --loss-type sft_loss has none.")


def _custom(args: argparse.Namespace) -> bool:
    return args.custom_advantage_function_path is not None


def _resolve_mismatch(args: argparse.Namespace) -> None:
    if args.use_tis and args.use_rollout_logprobs:
        raise UserError(
            "--use-tis corrects for the engine's log-probs, and --use-rollout-logprobs takes them as the old"
            " ones: with both the correction would count twice. Take one."
        )
    if args.custom_tis_function_path and not (args.use_tis or args.get_mismatch_metrics):
        raise UserError("--custom-tis-function-path needs --use-tis (or --get-mismatch-metrics).")
    if args.keep_old_actor and args.use_rollout_logprobs:
        raise UserError(
            "--keep-old-actor and --use-rollout-logprobs are two ways to know the old log-probs. Take one."
        )
    if args.use_opsm and args.advantage_estimator == "cispo":
        raise UserError("--use-opsm: CISPO keeps every token; leave it out.")
    if not 0 <= args.tis_clip_low <= args.tis_clip:
        raise UserError(
            f"--tis-clip-low {args.tis_clip_low} must be between 0 and --tis-clip {args.tis_clip}."
        )
