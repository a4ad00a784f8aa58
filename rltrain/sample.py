"""A sample: one prompt with one response, its tokens, log-probs, mask and reward.

Field names and meanings are slime's, so that generation and reward functions written for slime run
unchanged. Free of torch: the rollout process, custom functions and tests import it cheaply.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Message = dict[str, Any]


@dataclass
class Sample:
    """One response to one prompt. `tokens` holds prompt and response; the other lists only the response.

    `custom_rm_path`, `generate_function_path`: the sample's own reward and generation function, in place of the flags'.
    `multimodal_inputs`, `multimodal_train_inputs`: must stay None, because models here take neither images nor sound.
    `loss_mask`, `rollout_log_probs`, `teacher_log_probs`: one entry a response token (`response_length` of them),
    or None.
    `rollout_routed_experts`: the experts that the engine sent each token but the last to, an array [tokens − 1, layers,
    experts a token] (the last two may be one), or None.
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

    @dataclass
    class SpecInfo:
        """Speculative decoding of all requests together, in tokens; `spec_verify_ct` counts checks."""

        spec_accept_token_num: int = 0
        spec_draft_token_num: int = 0
        spec_verify_ct: int = 0
        completion_token_num: int = 0

        @property
        def spec_accept_rate(self) -> float:
            """Share of the drafted tokens that were accepted."""
            return self.spec_accept_token_num / max(self.spec_draft_token_num, 1)

        @property
        def spec_accept_length(self) -> float:
            """Tokens a check."""
            return self.completion_token_num / max(self.spec_verify_ct, 1)

        def add(self, meta_info: dict[str, Any]) -> None:
            """Count a request in."""
            if not meta_info.get("spec_verify_ct"):
                return
            for name in ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct"):
                setattr(self, name, getattr(self, name) + (meta_info.get(name) or 0))
            self.completion_token_num += meta_info.get("completion_tokens") or 0

    @dataclass
    class PrefixCacheInfo:
        """Prompt tokens of all requests together, and how many of them an engine had in its cache."""

        cached_tokens: int = 0
        total_prompt_tokens: int = 0

        @property
        def prefix_cache_hit_rate(self) -> float:
            """Share of the prompt tokens that were in the cache."""
            return self.cached_tokens / max(self.total_prompt_tokens, 1)

        def add(self, meta_info: dict[str, Any]) -> None:
            """Count a request in."""
            self.cached_tokens += meta_info.get("cached_tokens") or 0
            self.total_prompt_tokens += meta_info.get("prompt_tokens") or 0

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
    rollout_routed_experts: Any = None
    teacher_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    train_metadata: dict[str, Any] | None = None
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = (
        None  # a function's own; the flag's are applied before it
    )
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

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
        self,
        args: Any = None,
        *,
        tokens: Sequence[int],
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append tokens to the response and keep mask and log-probs in step with them. The signature is slime's.

        Args:
            args: Not used: what slime's functions give.
            tokens: Ids; a tensor or an array is taken too.
            log_probs: One a token. Those of tokens that are not trained on may be None and count as 0.
            trainable: False for tokens that the model did not write, such as the output of a tool.
            meta_info: What the engine said of the request: weight versions, use of its cache, and how it ended.
            text: The tokens as text, appended to `response`.
            update_terminal_info: Whether `meta_info` sets `status`; False for a part of an answer that still comes.

        Raises:
            ValueError: the number of log-probs differs from the number of tokens, or the response's mask or
                log-probs from its length; nothing is appended then.
        """
        tokens, log_probs = _plain(tokens), None if log_probs is None else _plain(log_probs)
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(log_probs)} log-probs")
        if log_probs is None and trainable and tokens:
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
                f" {len(self.rollout_log_probs)} log-probs: append tokens only with this method"
            )
        self.tokens += tokens
        self.rollout_log_probs += log_probs if log_probs is not None else [0.0] * len(tokens)
        self.loss_mask += [int(trainable)] * len(tokens)
        self.response_length += len(tokens)
        if text is not None:
            self.response += text
        if meta_info is not None:
            self._add_versions(before, len(tokens), meta_info)
            if meta_info.get("routed_experts"):
                self._add_routes(meta_info)
            if update_terminal_info and "finish_reason" in meta_info:
                self.spec_info.add(meta_info)
                self.prefix_cache_info.add(meta_info)
                self.status = _ENDED[meta_info["finish_reason"]["type"]]

    def _add_routes(self, meta_info: dict[str, Any]) -> None:
        """Take the experts of the tokens that are new since the request before.

        Earlier tokens keep theirs: with new weights an engine computes them again, and might send them elsewhere than
        when it sampled what follows.
        """
        import numpy as np

        flat = np.frombuffer(base64.b64decode(meta_info["routed_experts"]), np.int32)
        count = meta_info["prompt_tokens"] + meta_info["completion_tokens"] - 1
        if count < 1 or len(flat) % count:
            return
        routes = flat.reshape(count, -1).astype(np.int16)
        known = self.rollout_routed_experts
        if known is not None:
            known = known.reshape(len(known), -1)
            routes = np.concatenate([known[:count], routes[len(known) :]])
        self.rollout_routed_experts = routes

    def _add_versions(self, before: int, count: int, meta_info: dict[str, Any]) -> None:
        """Note which weights wrote the last `count` tokens of the response, which come after `before` others."""
        spans = meta_info.get("weight_versions") or []
        if not spans and "weight_version" in meta_info:
            spans = [{"version": meta_info["weight_version"], "start": 0, "end": count}]
        for span in spans:
            if span["version"] not in self.weight_versions:
                self.weight_versions.append(span["version"])
            shifted = {
                "version": span["version"],
                "start": before + span["start"],
                "end": before + span["end"],
            }
            self.weight_version_spans.append(shifted)

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
        """The fields as JSON-able values, with attributes that a function has added."""
        counted: dict[str, Any] = {
            "spec_info": dict(vars(self.spec_info)),
            "prefix_cache_info": dict(vars(self.prefix_cache_info)),
        }
        routes = self.rollout_routed_experts
        counted["rollout_routed_experts"] = routes if routes is None else [row.tolist() for row in routes]
        return {**vars(self), "status": self.status.value, **counted}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sample:
        """The inverse of `to_dict`."""
        known = {each.name for each in dataclasses.fields(cls)}
        sample = cls(**{name: value for name, value in fields.items() if name in known})
        sample.status = cls.Status(fields["status"])
        sample.spec_info = cls.SpecInfo(**fields.get("spec_info", {}))
        sample.prefix_cache_info = cls.PrefixCacheInfo(**fields.get("prefix_cache_info", {}))
        if sample.rollout_routed_experts is not None:
            import numpy as np

            sample.rollout_routed_experts = np.array(sample.rollout_routed_experts, np.int16)
        vars(sample).update({name: value for name, value in fields.items() if name not in known})
        return sample


_ENDED = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}


def _plain(values: Any) -> list[Any]:
    """A list of Python numbers, from a list, a tuple, an array or a tensor."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def age(rollout_id: int, versions: Sequence[str]) -> float | None:
    """Age of a sample's oldest token in rollout `rollout_id`, from the versions it has seen; None without any.

    The age of a token is `rollout_id` - v, where v is the version of the weights that sampled it: the number of
    rollouts they were trained on. It is 0 on-policy, and infinite where v is not a number: the trainer never sent
    such weights; an engine has them when it starts.
    """
    if not versions:
        return None
    try:
        return float(rollout_id - min(int(version) for version in versions))
    except ValueError:
        return math.inf
