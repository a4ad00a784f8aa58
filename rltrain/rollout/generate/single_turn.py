"""The default generation function and its sampling parameters: one prompt to the router, one response, as token ids."""

from __future__ import annotations

import argparse
import hashlib
import math
from typing import Any

from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.rollout import Rollout
from rltrain.rollout.generate.http import GenerationError, post, session_headers
from rltrain.sample import Sample

SamplingParams = dict[str, Any]


async def generate(args: argparse.Namespace, sample: Sample, sampling_params: SamplingParams) -> Sample:
    """Continue the sample's tokens by one response, with the engine's log-prob of every token.

    A sample that was aborted goes on where it stopped: its tokens count against the limit of the response.

    Raises:
        GenerationError: the tokens can't be sent, the prompt fills the context, or the engine refused them.
    """
    check_input_ids(sample.tokens, args.vocab_size)
    context = args.rollout_max_context_len - len(sample.tokens)
    room = min(sampling_params["max_new_tokens"] - sample.response_length, context)
    if room <= 0:
        if context <= 0 and not sample.response_length:
            raise GenerationError(
                f"the prompt has {len(sample.tokens)} tokens, which leaves no room for a response in a context of"
                f" {args.rollout_max_context_len}: leave such prompts out with --rollout-max-prompt-len"
            )
        sample.status = Sample.Status.TRUNCATED
        return sample
    output = await post(
        f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate",
        {
            "input_ids": sample.tokens,
            "sampling_params": {**sampling_params, "max_new_tokens": room},
            "return_logprob": True,
            **({"return_routed_experts": True} if args.use_rollout_routing_replay else {}),
        },
        headers=session_headers(args, sample.session_id),
    )
    return update_sample(sample, output)


def update_sample(sample: Sample, output: dict[str, Any]) -> Sample:
    """Append an engine's answer to the sample: tokens, log-probs, text, status, weight versions.

    Raises:
        GenerationError: the engine gave up on the request, or its log-probs are missing or not finite.
    """
    meta = output["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] == "abort" and reason.get("status_code"):
        raise GenerationError(f"the engine gave up on the request: {reason.get('message')}")
    if "output_token_logprobs" not in meta:
        raise GenerationError("the engine returned no log-probs (meta_info has no output_token_logprobs)")
    entries = meta["output_token_logprobs"]  # (log-prob, token id, text) each
    log_probs = [entry[0] for entry in entries]
    if not _are_finite(log_probs):
        raise GenerationError("the engine returned log-probs that are not finite numbers")
    sample.append_response_tokens(
        tokens=[entry[1] for entry in entries],
        log_probs=log_probs,
        meta_info=meta,
        text=output.get("text", ""),
    )
    return sample


def _are_finite(values: list[float]) -> bool:
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def check_input_ids(ids: list[int], vocab_size: int) -> None:
    """An id outside the vocabulary would end the engine: refuse it here.

    Raises:
        GenerationError: there is such an id, or there are no ids at all.
    """
    if not ids:
        raise GenerationError("the sample has no prompt tokens")
    for worst in (max(ids), min(ids)):
        if not 0 <= worst < vocab_size:
            raise GenerationError(f"token id {worst} is outside the model's vocabulary of {vocab_size}")


def sampling_params(rollout: Rollout) -> SamplingParams:
    """SGLang's sampling parameters for training rollouts."""
    return {
        "temperature": rollout.rollout_temperature,
        "top_p": rollout.rollout_top_p,
        "top_k": rollout.rollout_top_k,
        "max_new_tokens": rollout.rollout_max_response_len,
        "stop": rollout.rollout_stop,
        "stop_token_ids": rollout.rollout_stop_token_ids,
        "skip_special_tokens": rollout.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


def with_seed(
    engines: Engines, rollout: Rollout, params: SamplingParams, rollout_id: int | None, sample: Sample
) -> SamplingParams:
    """With deterministic engines: a seed for the sample alone, so that a run can be repeated token for token."""
    if not engines.sglang.get("enable_deterministic_inference"):
        return params
    name = f"{rollout.rollout_seed}/{rollout_id}/{sample.index}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1
    return {**params, "sampling_seed": seed}
