"""A sample: one prompt with one response, its tokens, log-probs, mask and reward.

Field names and meanings are slime's, so that generation and reward functions written for slime run
unchanged. Free of torch: the rollout process, custom functions and tests import it cheaply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Message = dict[str, Any]


@dataclass
class Sample:
    """One response to one prompt. `tokens` holds prompt and response; the other lists only the response.

    `loss_mask`, `rollout_log_probs`, `teacher_log_probs`: one entry a response token (`response_length` of them),
    or None.
    `rollout_id`: samples that share it were one rollout, of an agent that is trained on several texts; None for
    a sample that is a rollout by itself. `non_generation_time`: seconds between requests, as in tools.
    """

    class Status(Enum):
        """How generation ended."""

        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"  # stopped by a length limit
        ABORTED = "aborted"  # stopped by us; may be continued
        FAILED = "failed"  # generation or reward went wrong: see `failure`

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[Message] = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    teacher_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    generate_function_path: str | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0

    # Not in slime: which response tokens each version of the weights wrote, as {"version", "start", "end"} (what a
    # tool wrote is in none); why the sample failed; and where its time went (seconds).
    weight_version_spans: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    generate_seconds: float = 0.0  # in the generation function
    queue_seconds: float = 0.0  # before it, and of its requests until an engine began with them
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reward_seconds: float = 0.0

    def append_response_tokens(
        self, tokens: list[int], log_probs: list[float] | None, *, trainable: bool = True
    ) -> None:
        """Append tokens to the response and keep mask and log-probs in step with them.

        Tokens that the model did not write (tool output) are appended with `trainable=False`; their
        log-probs may be None and count as 0.

        Raises:
            ValueError: the number of log-probs differs from the number of tokens, or the response's mask or
                log-probs from its length; nothing is appended then.
        """
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(log_probs)} log-probs")
        if log_probs is None and trainable:
            raise ValueError("tokens that are trained on need log-probs")
        before = self.response_length
        if self.loss_mask is None:
            self.loss_mask = [1] * before
        if self.rollout_log_probs is None:
            if before:
                raise ValueError("the response has tokens without log-probs")
            self.rollout_log_probs = []
        if len(self.loss_mask) != before or len(self.rollout_log_probs) != before:
            raise ValueError(
                f"the response has {before} tokens, {len(self.loss_mask)} mask entries and"
                f" {len(self.rollout_log_probs)} log-probs: append tokens with this method only"
            )
        self.tokens += tokens
        self.rollout_log_probs += log_probs if log_probs is not None else [0.0] * len(tokens)
        self.loss_mask += [int(trainable)] * len(tokens)
        self.response_length += len(tokens)

    @property
    def rollout_key(self) -> int | None:
        """What identifies the rollout that the sample is of: `rollout_id`, or its own index."""
        return self.index if self.rollout_id is None else self.rollout_id

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.tokens) - self.response_length

    @property
    def effective_response_length(self) -> int:
        """Number of response tokens that are trained on."""
        return sum(self.loss_mask) if self.loss_mask is not None else self.response_length

    def get_reward_value(self, args: Any) -> float:
        """The scalar reward: the reward itself or, with `--reward-key`, that entry of it."""
        if not args.reward_key:
            return self.reward  # type: ignore[return-value]
        return self.reward[args.reward_key]  # type: ignore[index]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {**vars(self), "status": self.status.value}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`."""
        return cls(**{**fields, "status": cls.Status(fields["status"])})


def age(rollout_id: int, versions: Sequence[str]) -> float | None:
    """Age of a sample's oldest token in rollout `rollout_id`, from the versions it has seen; None without any.

    The age of a token is `rollout_id` - v, where v is the version of the weights that sampled it: the number of
    rollouts they were trained on. It is 0 on-policy, and infinite where v is no number: weights that the trainer
    never sent, as of an engine just started.
    """
    if not versions:
        return None
    try:
        return float(rollout_id - min(int(version) for version in versions))
    except ValueError:
        return math.inf
