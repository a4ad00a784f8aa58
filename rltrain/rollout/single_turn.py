"""The default generation function: one prompt to the router, one response back, as token ids."""

from __future__ import annotations

import argparse
import math
from typing import Any

from rltrain.rollout.http import GenerationError, post, session_headers
from rltrain.sample import Sample

_STATUS = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}


async def generate(args: argparse.Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
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
        },
        headers=session_headers(args, sample.session_id),
    )
    return update_sample(sample, output)


def update_sample(sample: Sample, output: dict[str, Any]) -> Sample:
    """Append an engine's answer to the sample: tokens, log-probs, text, status, weight versions.

    Raises:
        GenerationError: the engine gave up on the request, or returned no log-probs, or none that are finite.
    """
    meta = output["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] == "abort" and reason.get("status_code"):
        raise GenerationError(f"the engine gave up on the request: {reason.get('message')}")
    if "output_token_logprobs" not in meta:
        raise GenerationError("the engine returned no log-probs (meta_info has no output_token_logprobs)")
    entries = meta["output_token_logprobs"]  # (log-prob, token id, text) each
    before, log_probs = sample.response_length, [entry[0] for entry in entries]
    if not _are_finite(log_probs):
        raise GenerationError("the engine returned log-probs that are no finite numbers")
    sample.append_response_tokens([entry[1] for entry in entries], log_probs)
    sample.response += output.get("text", "")
    whole = [{"version": meta["weight_version"], "start": 0, "end": len(entries)}]
    for span in meta.get("weight_versions") or whole:
        if span["version"] not in sample.weight_versions:
            sample.weight_versions.append(span["version"])
        shifted = {"version": span["version"], "start": before + span["start"], "end": before + span["end"]}
        sample.weight_version_spans.append(shifted)
    sample.status = _STATUS[reason["type"]]
    return sample


def _are_finite(values: list[float]) -> bool:
    try:
        return math.isfinite(sum(values))
    except TypeError:
        return False


def check_input_ids(ids: list[int], vocab_size: int) -> None:
    """An id outside the vocabulary would end the engine: refuse it here.

    Raises:
        GenerationError: there is one, or there are no ids at all.
    """
    if not ids:
        raise GenerationError("the sample has no prompt tokens")
    for worst in (max(ids), min(ids)):
        if not 0 <= worst < vocab_size:
            raise GenerationError(f"token id {worst} is outside the model's vocabulary of {vocab_size}")
