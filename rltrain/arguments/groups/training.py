"""Training: batches, the parameters that are trained, the optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rltrain.arguments.declare import Owner, flag
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.groups.rollout import Rollout
from rltrain.run.errors import UserError

# Bytes that a GPU works on at a time where it makes log-probs of logits, unless --log-probs-chunk-size says.
LOGITS_WORKSPACE = 256 * 2**20
# Flags of Megatron with which what comes of a token depends on how many others there are.
_DEPEND_ON_OTHERS = (
    "moe_z_loss_coeff", "moe_expert_capacity_factor", "moe_input_jitter_eps", "moe_router_force_load_balancing",
    "moe_router_bias_update_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Training."""

    global_batch_size: int = flag("samples per optimizer step", metavar="N", at_least=1)
    num_steps_per_rollout: int = flag("optimizer steps per rollout", metavar="N", at_least=1)
    micro_batch_size: int = flag("samples in a micro-batch (default: 1)", 1, metavar="N", at_least=1)
    use_dynamic_batch_size: bool = flag(
        "pack samples into micro-batches of up to --max-tokens-per-gpu tokens", False
    )
    max_tokens_per_gpu: int | None = flag("tokens in a packed micro-batch", metavar="N", at_least=1)
    log_probs_max_tokens_per_gpu: int | None = flag(
        "tokens in a packed micro-batch where no gradient is needed", metavar="N"
    )
    log_probs_chunk_size: int = flag(
        "positions whose log-probs are computed at a time: fewer take less memory, with the same results (default: -1,"
        " chosen automatically)",
        -1,
        metavar="N",
    )
    balance_by_flops: bool = flag("even shares of arithmetic, not of tokens: long samples cost more", False)
    share_prompts: bool | None = flag(
        "compute only once a prefix that samples of a micro-batch share (default: where it is exact; with"
        " TransformerEngine, where it saves a quarter of a rollout's tokens)",
        owner="slurmlime",
    )
    only_train_params_name_list: list[str] | None = flag(
        "train only parameters that match one", metavar="REGEX", empty=True
    )
    freeze_params_name_list: list[str] | None = flag(
        "train no parameter that matches one", metavar="REGEX", empty=True
    )
    reset_optimizer_states: bool = flag("reset Adam's averages before every rollout", False)
    max_skipped_steps: int = flag(
        "stop the run after so many optimizer steps in a row with a non-finite loss or gradient (default: 10)",
        10,
        metavar="N",
        at_least=1,
        owner="slurmlime",
    )
    save_trainer_tokens: bool = flag(
        "do not write the trainer's log-probs, entropies and advantages of every token",
        True,
        option="--no-save-trainer-tokens",
        owner="slurmlime",
    )


# Of attention and MLP in all families that can have adapters, as Hugging Face names them.
LORA_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """LoRA.

    Low-rank adapters are trained and the model's own weights are not; engines get both merged: docs/lora.md.
    """

    owner: ClassVar[Owner] = "slurmlime"

    lora_rank: int = flag("rank of the adapters (default: 0, none)", 0, metavar="R", at_least=0)
    lora_alpha: float | None = flag("adapters are scaled by A / R (default: 2 R)", metavar="A")
    lora_target_modules: list[str] | None = flag(
        "linear layers with adapters, as PEFT names them: q_proj k_proj …, or all-linear (default)",
        metavar="NAME",
    )

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        assert self.lora_alpha is not None
        return self.lora_alpha / self.lora_rank

    def is_target(self, name: str) -> bool:
        """Whether the module with this name, such as q_proj, has an adapter."""
        targets = self.lora_target_modules or []
        return name in targets or "all-linear" in targets


@dataclass(frozen=True)
class Mtp:
    """Multi-token prediction.

    The layer that predicts the token after the next, for speculative decoding. It is trained beside the policy.
    """

    enable_mtp_training: bool = flag("train the MTP layer; docs/adding_a_model.md lists the models", False)
    mtp_num_layers: int | None = flag(
        "number of MTP layers (only 1 is supported)", metavar="1", owner="Megatron"
    )
    mtp_loss_scaling_factor: float | None = flag(
        "weight of the MTP layer's loss (default: 0.1)", metavar="W", owner="Megatron"
    )

    @property
    def scale(self) -> float:
        """What its loss is multiplied by."""
        return 0.1 if self.mtp_loss_scaling_factor is None else self.mtp_loss_scaling_factor


def check_mtp_flags(mtp: Mtp) -> None:
    """Refuse what would do nothing, or is not there.

    Raises:
        UserError: names the flag.
    """
    given = {
        "--mtp-num-layers": mtp.mtp_num_layers,
        "--mtp-loss-scaling-factor": mtp.mtp_loss_scaling_factor,
    }
    if not mtp.enable_mtp_training:
        if flag := next((name for name, value in given.items() if value is not None), None):
            raise UserError(
                f"{flag} {given[flag]}: without --enable-mtp-training MTP layers are not trained and stay as they are"
                " in --hf-checkpoint. Give that flag too, or leave this one out."
            )
        return
    if mtp.mtp_num_layers not in (None, 1):
        raise UserError(
            f"--mtp-num-layers {mtp.mtp_num_layers}: only one layer can be trained, which predicts the token after the"
            " next."
        )
    if mtp.scale <= 0:
        raise UserError(f"--mtp-loss-scaling-factor {mtp.scale:g} must be above 0.")


@dataclass(frozen=True)
class Optimizer:
    """Optimizer and schedule of Megatron."""

    owner: ClassVar[Owner] = "Megatron"

    optimizer: Literal["adam", "sgd"] = flag("default: adam (with decoupled weight decay)", "adam")
    lr: float = flag(
        "learning rate (default: 1e-6, as in slime)", 1e-06, metavar="LR", at_least=0, owner="slime"
    )
    min_lr: float = flag("learning rate at the end of the decay (default: 0)", 0.0, metavar="LR", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag(
        "default: constant", "constant"
    )
    lr_warmup_iters: int = flag("warm-up, in optimizer steps (default: 0)", 0, metavar="N")
    lr_warmup_fraction: float | None = flag("warm-up, as a share of the schedule's steps", metavar="F")
    lr_warmup_init: float = flag("learning rate at the start of the warm-up (default: 0)", 0.0, metavar="LR")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = flag(
        "how WSD's last part decays (default: exponential)", "exponential"
    )
    lr_wsd_decay_iters: int | None = flag("length of WSD's last part, in optimizer steps", metavar="N")
    lr_decay_iters: int | None = flag("length of the decay, in optimizer steps (default: all)", metavar="N")
    weight_decay: float = flag("default: 0.01", 0.01, metavar="W", at_least=0)
    start_weight_decay: float | None = flag("weight decay at the start of training", metavar="W")
    end_weight_decay: float | None = flag("weight decay at the end of training", metavar="W")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = flag(
        "how the weight decay changes (default: constant)", "constant"
    )
    adam_beta1: float = flag("default: 0.9", 0.9, metavar="B", at_least=0, at_most=1)
    adam_beta2: float = flag("default: 0.999", 0.999, metavar="B", at_least=0, at_most=1)
    adam_eps: float = flag("default: 1e-8", 1e-08, metavar="E")
    clip_grad: float = flag(
        "largest gradient norm (default: 1.0)", 1.0, metavar="NORM", at_least=0, owner="slime"
    )
    seed: int = flag("default: 1234", 1234, metavar="SEED", owner="slime")


def logits_rows(chunk_size: int, columns: int, workspace: int = LOGITS_WORKSPACE) -> int:
    """Positions whose log-probs are computed at a time: `chunk_size`, or if that is -1 what `workspace` has room for.

    Args:
        columns: Logits of a position on this rank, each of which takes two fp32 numbers meanwhile.
    """
    return chunk_size if chunk_size > 0 else max(1, workspace // (2 * 4 * max(1, columns)))


def resolve_training(training: Training, rollout: Rollout) -> Training:
    """Fill in what follows from other flags.

    Raises:
        UserError: names the flags that contradict each other, with their values.
    """
    training = _resolve_steps(training, rollout)
    if training.log_probs_chunk_size < 1 and training.log_probs_chunk_size != -1:
        raise UserError(
            f"--log-probs-chunk-size is {training.log_probs_chunk_size}: it must be a number of positions, or -1."
        )
    if training.use_dynamic_batch_size and training.max_tokens_per_gpu is None:
        raise UserError(
            "--use-dynamic-batch-size needs --max-tokens-per-gpu: the tokens of a packed micro-batch."
        )
    if training.log_probs_max_tokens_per_gpu is None:
        return replace(training, log_probs_max_tokens_per_gpu=training.max_tokens_per_gpu)
    return training


def resolve_lora(lora: Lora) -> Lora:
    """Fill in alpha and the layers that have adapters.

    Raises:
        UserError: a flag does nothing without another, or has no meaning.
    """
    if not lora.lora_rank:
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(lora, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} does nothing without --lora-rank: give both.")
        return lora
    if lora.lora_alpha is not None and not lora.lora_alpha > 0:
        raise UserError(f"--lora-alpha {lora.lora_alpha:g}: it must be greater than 0.")
    targets = lora.lora_target_modules or ["all-linear"]
    if unknown := [name for name in targets if name not in (*LORA_MODULES, "all-linear")]:
        raise UserError(
            f"--lora-target-modules {unknown[0]}: that layer can't have an adapter; {', '.join(LORA_MODULES)} can, and"
            " all-linear stands for all of them in the model."
        )
    targets = [name for name in (*LORA_MODULES, "all-linear") if name in targets]  # checkpoints compare them
    alpha = 2.0 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha
    return replace(lora, lora_alpha=alpha, lora_target_modules=targets)


def check_micro_batches(training: Training, data_ranks: int) -> None:
    """Check that data parallel ranks get equal shares of a step; packed micro-batches always fit.

    Raises:
        UserError: names the flags, with their values.
    """
    size, batch = training.micro_batch_size, training.global_batch_size
    if not training.use_dynamic_batch_size and batch % (data_ranks * size):
        raise UserError(
            f"--global-batch-size {batch} is not a multiple of --micro-batch-size {size} × {data_ranks} data parallel"
            " ranks; --use-dynamic-batch-size has no such limit."
        )


def check_schedule(optimizer: Optimizer) -> None:
    """Refuse schedules that can't be right.

    Raises:
        UserError: names the flags.
    """
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        raise UserError("--lr-warmup-fraction and --lr-warmup-iters say the same thing: give one of them.")
    if optimizer.lr_warmup_fraction is not None and not 0 <= optimizer.lr_warmup_fraction < 1:
        raise UserError(f"--lr-warmup-fraction {optimizer.lr_warmup_fraction}: it is between 0 and 1.")
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        raise UserError("--lr-decay-style WSD needs --lr-wsd-decay-iters: the steps of its last part.")
    weight_decays = (optimizer.start_weight_decay, optimizer.end_weight_decay)
    if optimizer.weight_decay_incr_style != "constant" and None in weight_decays:
        raise UserError(
            f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs --start-weight-decay and"
            " --end-weight-decay."
        )
    if optimizer.weight_decay_incr_style == "constant" and weight_decays != (None, None):
        raise UserError(
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine."
        )


def why_separate(
    training: Training, parallel: Parallel, model: Model, algorithm: Algorithm, functions: Functions
) -> str | None:
    """Why every sample goes through the model by itself, in words, or None where prompts can be shared."""
    if training.share_prompts is False:
        return "--no-share-prompts"
    if parallel.context_parallel_size > 1:
        return "--context-parallel-size splits every sequence separately"
    if not training.use_dynamic_batch_size and training.micro_batch_size == 1:
        return "a micro-batch is one sample, without --use-dynamic-batch-size"
    if functions.custom_model_provider_path:
        return "a model of --custom-model-provider-path may not support it"
    if algorithm.use_routing_replay or algorithm.use_rollout_routing_replay:
        return "with routing replay the same token has different experts in different samples"
    if flags := _counting(model):
        return f"{flags[0]} counts tokens, and would count shared tokens once"
    return None


def _counting(model: Model) -> list[str]:
    given = model.megatron.get("transformer", {})
    names = [name for name in _DEPEND_ON_OTHERS if given.get(name)]
    if model.moe_aux_loss_coeff:
        names.append("moe_aux_loss_coeff")
    return [f"--{name.replace('_', '-')}" for name in names]


def _resolve_steps(training: Training, rollout: Rollout) -> Training:
    samples = rollout.rollout_batch_size * rollout.n_samples_per_prompt
    product = (
        f"--rollout-batch-size {rollout.rollout_batch_size} × --n-samples-per-prompt"
        f" {rollout.n_samples_per_prompt}"
    )
    if training.global_batch_size is None:
        steps = training.num_steps_per_rollout or 1
        if samples % steps:
            raise UserError(
                f"{product} = {samples} samples do not divide into --num-steps-per-rollout {steps} optimizer steps."
            )
        return replace(training, global_batch_size=samples // steps, num_steps_per_rollout=steps)
    if training.num_steps_per_rollout is None:
        if samples % training.global_batch_size:
            raise UserError(
                f"{product} = {samples} samples are not a multiple of --global-batch-size {training.global_batch_size}."
            )
        return replace(training, num_steps_per_rollout=samples // training.global_batch_size)
    if samples != training.global_batch_size * training.num_steps_per_rollout:
        raise UserError(
            f"{product} = {samples} samples, but --global-batch-size {training.global_batch_size} ×"
            f" --num-steps-per-rollout {training.num_steps_per_rollout} ="
            f" {training.global_batch_size * training.num_steps_per_rollout}: they must be equal. Leave one of the last"
            " two out and it is worked out for you."
        )
    return training
