"""On-policy distillation from a teacher behind a server: `--use-opd --opd-type sglang --rm-url http://HOST:PORT/generate`.

`--custom-rm-path rltrain.rewards.distillation.reward_func` asks an SGLang server, which serves the teacher, for its
log-probs of the sample's tokens. `--custom-reward-post-process-path rltrain.rewards.distillation.post_process_rewards`
puts them where the trainer looks for them. slime has the same two functions.
"""

from __future__ import annotations

import argparse
from typing import Any

from rltrain.rewards.remote import post_json
from rltrain.sample import Sample

_KEY = "teacher_log_probs"


async def reward_func(args: argparse.Namespace, sample: Sample, **kwargs: Any) -> dict[str, list[float]]:
    """The teacher's log-prob of every response token, at temperature 1.

    Raises:
        RuntimeError: the server refused the request, or its answer has no log-probs for these tokens.
    """
    if not args.rm_url:
        raise RuntimeError("--rm-url is missing: the teacher's server, such as http://HOST:PORT/generate")
    answer = await post_json(
        args.rm_url,
        {
            "input_ids": sample.tokens,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0, "skip_special_tokens": False},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    entries = answer.get("meta_info", {}).get("input_token_logprobs") or []  # (log-prob, token id, text) each
    if [entry[1] for entry in entries] != sample.tokens:
        raise RuntimeError(
            f"{args.rm_url} answered with log-probs of {len(entries)} tokens, not of the {len(sample.tokens)} sent:"
            " is it /generate of an SGLang server, and does the teacher have the same tokenizer?"
        )
    return {_KEY: [entry[0] for entry in entries[sample.prompt_length :]]}


def post_process_rewards(
    args: object, samples: list[Sample], **kwargs: Any
) -> tuple[list[float | None], list[float]]:
    """Put the teacher's log-probs where the trainer looks for them; the reward is 0: only the teacher counts."""
    for sample in samples:
        if isinstance(sample.reward, dict) and _KEY in sample.reward:
            sample.teacher_log_probs, sample.reward = sample.reward[_KEY], 0.0
    raw = [None if sample.reward is None else 0.0 for sample in samples]
    return raw, [0.0] * len(samples)
