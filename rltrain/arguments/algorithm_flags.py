"""slime's flags of the algorithm: what the loss is, and what the advantage is made of; docs/algorithms.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from rltrain.arguments.errors import UserError

ESTIMATORS = ("grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
_WITH_KL_IN_REWARD = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


def add_algorithm_flags(group: argparse._ArgumentGroup) -> None:
    """Add them to a group of the parser."""
    _loss(group)
    _advantage(group)
    _kl(group)
    _mismatch(group)


def _loss(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--loss-type", choices=["policy_loss", "sft_loss"], default="policy_loss",
        help="default: policy_loss")  # fmt: skip
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
    add("--gamma", type=float, default=1.0, metavar="G", help="discount of reinforce_plus_plus (default: 1)")
    add("--custom-advantage-function-path", metavar="PATH",
        help="function(args, rollout_data) that sets rollout_data['advantages']")  # fmt: skip


def _kl(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--kl-coef", type=float, default=0.0, metavar="B", help="KL to the reference taken off the reward")
    add("--use-kl-loss", action="store_true", help="KL to the reference as a term of the loss")
    add("--kl-loss-coef", type=float, default=0.0, metavar="B", help="its weight (default: 0)")
    add("--kl-loss-type", choices=["k1", "k2", "k3", "low_var_kl"], default="k1",
        help="estimator (default: k1)")  # fmt: skip
    add("--use-unbiased-kl", action="store_true", help="weigh it with π/π_old, for several steps a rollout")


def _mismatch(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-rollout-logprobs", action="store_true", help="take the engine's log-probs as the old ones")
    add("--use-tis", action="store_true", help="weigh the loss with trainer's over engine's probability")
    add("--tis-clip", type=float, default=2.0, metavar="W", help="largest weight (default: 2)")
    add("--tis-clip-low", type=float, default=0.0, metavar="W", help="smallest weight (default: 0)")
    add("--custom-tis-function-path", metavar="PATH",
        help="another correction, such as rltrain.algorithms.mismatch.icepop")  # fmt: skip


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
    if not 0 <= args.gamma <= 1:
        raise UserError(f"--gamma {args.gamma}: a discount is between 0 and 1.")
    if args.gamma != 1 and args.advantage_estimator != "reinforce_plus_plus" and not _custom(args):
        raise UserError(f"--gamma {args.gamma}: {estimator} discounts nothing; reinforce_plus_plus does.")
    if args.use_unbiased_kl and not args.use_kl_loss:
        raise UserError("--use-unbiased-kl changes the KL loss: it needs --use-kl-loss.")
    _resolve_mismatch(args)


def _custom(args: argparse.Namespace) -> bool:
    return args.custom_advantage_function_path is not None


def _resolve_mismatch(args: argparse.Namespace) -> None:
    if args.use_tis and args.use_rollout_logprobs:
        raise UserError(
            "--use-tis corrects for the engine's log-probs, and --use-rollout-logprobs takes them as the old"
            " ones: with both the correction would count twice. Take one."
        )
    if args.custom_tis_function_path and not args.use_tis:
        raise UserError("--custom-tis-function-path needs --use-tis.")
    if not 0 <= args.tis_clip_low <= args.tis_clip:
        raise UserError(
            f"--tis-clip-low {args.tis_clip_low} must be between 0 and --tis-clip {args.tis_clip}."
        )


def read_custom_config(path: str) -> dict[str, object]:
    """The settings of `--custom-config-path`, which become attributes of `args`: TOML, JSON or YAML.

    Raises:
        UserError: it can't be read, or holds no names with values.
    """
    import json
    import tomllib

    file = Path(path).expanduser()
    try:
        text = file.read_text()
        if file.suffix == ".toml":
            settings = tomllib.loads(text)
        elif file.suffix == ".json":
            settings = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped]

            settings = yaml.safe_load(text)
    except ImportError:
        raise UserError(
            f"--custom-config-path {path}: YAML needs PyYAML; write it as TOML or JSON."
        ) from None
    except Exception as error:
        raise UserError(f"--custom-config-path {path}: {type(error).__name__}: {error}.") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"--custom-config-path {path}: it must hold names with values.")
    return {name.replace("-", "_"): value for name, value in settings.items()}
