"""A rollout: how much is generated, how it is sampled, and how it is graded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rltrain.arguments.declare import flag, worked_out
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """Rollout."""

    num_rollout: int = flag(
        "rollouts (steps of the loop) in the whole run; 0: only evaluate", metavar="N", at_least=0
    )
    num_epoch: int | None = flag(
        "passes over the prompts, if --num-rollout is not given", metavar="N", at_least=1
    )
    start_rollout_id: int | None = flag(
        "first rollout (default: the one after the loaded checkpoint)", metavar="N"
    )
    rollout_batch_size: int = flag("prompts per rollout", metavar="N", at_least=1)
    n_samples_per_prompt: int = flag("responses per prompt (default: 1)", 1, metavar="N", at_least=1)
    rollout_temperature: float = flag("default: 1.0", 1.0, metavar="T")
    rollout_top_p: float = flag("default: 1.0", 1.0, metavar="P", at_least=1e-6, at_most=1)
    rollout_top_k: int = flag(
        "sample from the k likeliest tokens; -1: off (default)", -1, metavar="K", at_least=-1
    )
    rollout_max_context_len: int | None = flag(
        "prompt and response together, in tokens", metavar="N", at_least=1
    )
    rollout_max_prompt_len: int | None = flag(
        "longest prompt; longer ones are left out and counted", metavar="N", at_least=1
    )
    rollout_max_response_len: int = flag(
        "longest response, in tokens (default: 1024)", 1024, metavar="N", at_least=1
    )
    rollout_stop: list[str] | None = flag("stop words", metavar="TEXT")
    rollout_stop_token_ids: list[int] | None = flag("stop tokens", metavar="ID")
    rollout_skip_special_tokens: bool = flag("leave special tokens out of the response text", False)
    over_sampling_batch_size: int = flag(
        "prompts sampled at a time if a filter drops some (default: --rollout-batch-size)", metavar="N"
    )
    partial_rollout: bool = flag(
        "continue responses later that were stopped because the batch was full", False
    )
    mask_offpolicy_in_partial_rollout: bool = flag(
        "with --partial-rollout: do not train on tokens of an earlier rollout", False
    )
    max_failed_fraction: float = flag(
        "share of failed samples in a batch that stops the run (default: 0.5)",
        0.5,
        metavar="F",
        owner="slurmlime",
    )
    rollout_seed: int = flag("seed of shuffling and sampling (default: 42)", 42, metavar="SEED")
    max_staleness: int = flag(
        "how many versions a sample's weights may be behind; rollouts run that far ahead (default: 0)",
        0,
        metavar="K",
        owner="slurmlime",
    )
    rollout_state_dir: str | None = (
        worked_out()
    )  # where the data source keeps its place; set by the rollout process


@dataclass(frozen=True)
class Rewards:
    """Rewards."""

    rm_type: str | None = flag("built-in reward; see docs/rewards.md", metavar="NAME")
    rm_url: str | None = flag("URL of the server of --rm-type remote_rm", metavar="URL")
    reward_key: str | None = flag("entry of a dict reward to train on", metavar="KEY")
    reward_timeout: float = flag(
        "seconds after which a reward fails its sample", 30.0, metavar="S", at_least=0, owner="slurmlime"
    )
    reward_num_workers: int = flag(
        "reward processes (default: 1)", 1, metavar="N", at_least=1, owner="slurmlime"
    )
    group_rm: bool = flag("grade the samples of a prompt together", False)


def resolve_rollout(rollout: Rollout) -> Rollout:
    """Fill in what follows from other flags.

    Raises:
        UserError: names the flags that can't be right, with their values.
    """
    sampled = rollout.over_sampling_batch_size
    if sampled is None:
        rollout = replace(rollout, over_sampling_batch_size=rollout.rollout_batch_size)
    elif sampled < rollout.rollout_batch_size:
        raise UserError(
            f"--over-sampling-batch-size {sampled} is less than --rollout-batch-size"
            f" {rollout.rollout_batch_size}: the number of prompts to sample must be at least the number to keep."
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        raise UserError("--mask-offpolicy-in-partial-rollout needs --partial-rollout.")
    if not 0 <= rollout.max_failed_fraction <= 1:
        raise UserError(f"--max-failed-fraction {rollout.max_failed_fraction}: it is between 0 and 1.")
    if rollout.max_staleness < 0:
        raise UserError(f"--max-staleness {rollout.max_staleness}: it must be at least 0 (on-policy).")
    return rollout


def check_temperature(rollout: Rollout) -> None:
    """Refuse to sample greedily.

    Raises:
        UserError: names the flag.
    """
    if rollout.rollout_temperature <= 0:
        raise UserError(
            "--rollout-temperature must be positive: training needs samples, not the greedy response."
        )
