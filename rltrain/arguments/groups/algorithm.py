"""The algorithm: what the loss is, and what the advantage is made of; docs/algorithms.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rltrain.arguments.declare import flag
from rltrain.arguments.groups.functions import Functions
from rltrain.run.errors import UserError

_WITH_KL_IN_REWARD = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
_DISCOUNTING = ("reinforce_plus_plus", "ppo")


@dataclass(frozen=True)
class Algorithm:
    """Algorithm."""

    loss_type: Literal["policy_loss", "sft_loss", "custom_loss"] = flag("default: policy_loss", "policy_loss")
    eps_clip: float = flag("PPO clip range (default: 0.2)", 0.2, metavar="E", at_least=0)
    eps_clip_high: float = flag("upper clip range (default: --eps-clip)", metavar="E", at_least=0)
    eps_clip_c: float | None = flag("dual clip for negative advantages, > 1", metavar="C")
    entropy_coef: float = flag("entropy bonus (default: 0)", 0.0, metavar="C")
    use_rollout_entropy: bool = flag(
        "compute the entropy with the log-probs of policy and reference, before training: rollout/entropy",
        False,
    )
    calculate_per_token_loss: bool = flag("mean over all tokens, not over samples", False)
    advantage_estimator: Literal[
        "grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"
    ] = flag("default: grpo", "grpo")
    grpo_std_normalization: bool = flag(
        "do not divide by the group's standard deviation (Dr.GRPO)",
        True,
        option="--disable-grpo-std-normalization",
    )
    rewards_normalization: bool = flag(
        "train on the rewards as graded", True, option="--disable-rewards-normalization"
    )
    normalize_advantages: bool = flag("whiten advantages over all tokens of the rollout", False)
    gamma: float = flag("discount of ppo and reinforce_plus_plus (default: 1)", 1.0, metavar="G")
    lambd: float = flag("λ of ppo's GAE (default: 1)", 1.0, metavar="L")
    compute_advantages_and_returns: bool = flag(
        "compute no advantages: for a custom loss that needs none",
        True,
        option="--disable-compute-advantages-and-returns",
    )
    kl_coef: float = flag("weight of the KL to the reference, subtracted from the reward", 0.0, metavar="B")
    use_kl_loss: bool = flag("add the KL to the reference to the loss", False)
    kl_loss_coef: float = flag("weight of the KL loss (default: 0)", 0.0, metavar="B")
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = flag("estimator of the KL (default: k1)", "k1")
    ref_update_interval: int | None = flag(
        "rollouts between updates of the reference to the current policy (default: never)",
        metavar="N",
        at_least=1,
    )
    use_unbiased_kl: bool = flag("weight the KL loss by π/π_old, for several steps per rollout", False)
    use_rollout_logprobs: bool = flag("use the engine's log-probs as the old ones", False)
    keep_old_actor: bool = flag(
        "use the log-probs of the weights that generated the rollout as the old ones", False
    )
    use_opsm: bool = flag("leave out bad responses that the policy is now unlikely to write", False)
    opsm_delta: float = flag(
        "with --use-opsm: the mean log π_old − log π above which they are left out (default: 1e-4)",
        0.0001,
        metavar="D",
    )
    get_mismatch_metrics: bool = flag("log the metrics of --use-tis without its correction", False)
    use_tis: bool = flag("weight the loss by the trainer's probability over the engine's", False)
    tis_clip: float = flag("largest weight of --use-tis (default: 2)", 2.0, metavar="W")
    tis_clip_low: float = flag("smallest weight of --use-tis (default: 0)", 0.0, metavar="W")
    use_routing_replay: bool = flag(
        "experts: training passes route tokens as the pass of the old log-probs did", False
    )
    use_rollout_routing_replay: bool = flag(
        "experts: the trainer routes tokens as the engine did (R3)", False
    )
    use_opd: bool = flag("on-policy distillation: a teacher grades every token", False)
    opd_type: Literal["sglang", "megatron"] | None = flag(
        "where the teacher is: in the rollout (teacher_log_probs of its samples) or in the trainer"
    )
    opd_kl_coef: float = flag(
        "weight of log π − log π_teacher, subtracted from the advantage (default: 1)", 1.0, metavar="C"
    )
    opd_teacher_load: str | None = flag(
        "with --opd-type megatron: the teacher, of the policy's shape", metavar="DIR"
    )
    opd_teacher_ckpt_step: int | None = flag(
        "step of the teacher's checkpoint (default: the latest)", metavar="N"
    )


def resolve_algorithm(algorithm: Algorithm, functions: Functions) -> Algorithm:
    """Fill in what follows from other flags, and refuse what can't be right.

    Raises:
        UserError: names the flags that contradict each other, with their values.
    """
    if algorithm.eps_clip_c is not None and algorithm.eps_clip_c <= 1:
        raise UserError(f"--eps-clip-c {algorithm.eps_clip_c}: the dual clip must be greater than 1.")
    if algorithm.eps_clip_c is not None and algorithm.advantage_estimator == "cispo":
        raise UserError("--eps-clip-c: CISPO's loss has no dual clip; leave it out.")
    own = functions.custom_advantage_function_path is not None
    estimator = f"--advantage-estimator {algorithm.advantage_estimator}"
    if algorithm.kl_coef and algorithm.advantage_estimator not in _WITH_KL_IN_REWARD and not own:
        raise UserError(
            f"--kl-coef {algorithm.kl_coef}: {estimator} adds the KL to the reference to the loss, not to the reward."
            f" Use --use-kl-loss --kl-loss-coef instead, or one of {', '.join(_WITH_KL_IN_REWARD)}."
        )
    for name, value in (("gamma", algorithm.gamma), ("lambd", algorithm.lambd)):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} {value}: a discount is between 0 and 1.")
    if algorithm.gamma != 1 and algorithm.advantage_estimator not in _DISCOUNTING and not own:
        raise UserError(
            f"--gamma {algorithm.gamma}: {estimator} does not discount; {' and '.join(_DISCOUNTING)} do."
        )
    if algorithm.lambd != 1 and algorithm.advantage_estimator != "ppo" and not own:
        raise UserError(f"--lambd {algorithm.lambd}: {estimator} has no critic; ppo has one.")
    if algorithm.use_unbiased_kl and not algorithm.use_kl_loss:
        raise UserError("--use-unbiased-kl changes the KL loss: it needs --use-kl-loss.")
    if algorithm.ref_update_interval is not None and not (algorithm.use_kl_loss or algorithm.kl_coef):
        raise UserError("--ref-update-interval: nothing uses a reference; add --use-kl-loss or --kl-coef.")
    _check_loss(algorithm, functions)
    _check_mismatch(algorithm, functions)
    _check_distillation(algorithm)
    if algorithm.eps_clip_high is None:
        return replace(algorithm, eps_clip_high=algorithm.eps_clip)
    return algorithm


def _check_loss(algorithm: Algorithm, functions: Functions) -> None:
    custom = algorithm.loss_type == "custom_loss"
    if custom != bool(functions.custom_loss_function_path):
        raise UserError("--loss-type custom_loss and --custom-loss-function-path belong together.")
    if not algorithm.compute_advantages_and_returns and algorithm.loss_type == "policy_loss":
        raise UserError(
            "--disable-compute-advantages-and-returns: only a custom loss or sft_loss works without them."
        )
    if algorithm.use_rollout_entropy and algorithm.loss_type == "sft_loss":
        raise UserError(
            "--use-rollout-entropy: sft_loss has no pass before training; train/entropy is logged anyway."
        )


def _check_distillation(algorithm: Algorithm) -> None:
    if not algorithm.use_opd:
        for name in ("opd_type", "opd_teacher_load", "opd_teacher_ckpt_step"):
            if getattr(algorithm, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: it needs --use-opd.")
        return
    if algorithm.opd_type is None:
        raise UserError("--use-opd needs --opd-type: sglang or megatron.")
    if (algorithm.opd_type == "megatron") != (algorithm.opd_teacher_load is not None):
        raise UserError(
            "--opd-teacher-load and --opd-type megatron belong together; with sglang the samples bring"
            " teacher_log_probs."
        )
    if algorithm.loss_type == "sft_loss":
        raise UserError("--use-opd grades the model's own responses; --loss-type sft_loss has none.")


def _check_mismatch(algorithm: Algorithm, functions: Functions) -> None:
    if algorithm.use_tis and algorithm.use_rollout_logprobs:
        raise UserError(
            "--use-tis corrects for the engine's log-probs, and --use-rollout-logprobs takes them as the old"
            " ones: both would correct twice. Give one."
        )
    if functions.custom_tis_function_path and not (algorithm.use_tis or algorithm.get_mismatch_metrics):
        raise UserError("--custom-tis-function-path needs --use-tis (or --get-mismatch-metrics).")
    if algorithm.keep_old_actor and algorithm.use_rollout_logprobs:
        raise UserError(
            "--keep-old-actor and --use-rollout-logprobs are two sources of the old log-probs. Give one."
        )
    if algorithm.use_opsm and algorithm.advantage_estimator == "cispo":
        raise UserError("--use-opsm: CISPO keeps every token; leave it out.")
    if not 0 <= algorithm.tis_clip_low <= algorithm.tis_clip:
        raise UserError(
            f"--tis-clip-low {algorithm.tis_clip_low} must be between 0 and --tis-clip {algorithm.tis_clip}."
        )
