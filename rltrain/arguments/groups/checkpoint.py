"""Checkpoints: where from, where to, how often; docs/checkpoints.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rltrain.arguments.declare import flag
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints."""

    load: str | None = flag("checkpoints or Hugging Face directory to start from", metavar="DIR")
    ref_load: str | None = flag(
        "weights of the reference model (default: the first weights), and of the policy where --load has no checkpoint",
        metavar="DIR",
    )
    save: str | None = flag("where checkpoints go (default: checkpoints/ of the run)", metavar="DIR")
    ref_ckpt_step: int | None = flag(
        "step of the checkpoint of --ref-load (default: the latest)", metavar="N"
    )
    finetune: bool = flag("load only the weights of --load, and begin at rollout 0", False, owner="Megatron")
    save_interval: int | None = flag("rollouts between checkpoints", metavar="N", at_least=1)
    save_hf: str | None = flag("also write Hugging Face weights at the end", metavar="DIR")
    no_save_optim: bool = flag("save no optimizer state", False)
    no_save_rng: bool = flag(
        "do not save the states of the random number generators", False, owner="Megatron"
    )
    no_load_optim: bool = flag("ignore the optimizer state of --load", False, owner="Megatron")
    no_load_rng: bool = flag("do not restore the random number generators", False, owner="Megatron")
    trust_load: bool = flag(
        "load checkpoints that other users may have written: loading runs the code in them",
        False,
        owner="slurmlime",
    )
    async_save: bool = flag("write checkpoints while training continues", False)
    ckpt_format: Literal["torch_dist", "torch"] = flag(
        "torch_dist fits any parallel layout (default); torch only the layout that it was saved with",
        "torch_dist",
        owner="Megatron",
    )
    keep_last_k: int | None = flag(
        "remove all but the newest K checkpoints (default: keep all)",
        metavar="K",
        at_least=1,
        owner="slurmlime",
    )
    save_retain_interval: int | None = flag(
        "keep the checkpoints of every N rollouts, and the newest", metavar="N", at_least=1, owner="Megatron"
    )
    ckpt_step: int | None = flag(
        "step of the checkpoint of --load (default: the latest)", metavar="N", owner="Megatron"
    )


def starts_elsewhere(checkpoint: Checkpoint) -> bool:
    """Whether a run's first weights may differ from --hf-checkpoint's, which its engines load."""
    return bool(checkpoint.load or checkpoint.ref_load)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Refuse what contradicts itself.

    Raises:
        UserError: names the flags.
    """
    load, save = checkpoint.load, checkpoint.save
    if checkpoint.async_save and checkpoint.ckpt_format == "torch":
        raise UserError("--async-save writes --ckpt-format torch_dist only: leave one of them out.")
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    if interval and retained and retained % interval:
        raise UserError(
            f"--save-retain-interval {retained} is not a multiple of --save-interval {interval}: no checkpoint is"
            " written after those rollouts."
        )
    if checkpoint.ckpt_step is not None and load is None:
        raise UserError("--ckpt-step selects a checkpoint of --load: give --load.")
    if checkpoint.ckpt_step is not None and load == save:
        raise UserError(
            f"--ckpt-step {checkpoint.ckpt_step}: this run saves to --load, and a restart must resume from its newest"
            " checkpoint. Give another --save."
        )
    if checkpoint.ref_ckpt_step is not None and checkpoint.ref_load is None:
        raise UserError("--ref-ckpt-step selects a checkpoint of --ref-load: give --ref-load.")
