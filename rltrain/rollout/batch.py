"""Many samples at once: generated with bounded concurrency, graded as soon as each is there."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import inspect
import time
from collections.abc import Callable
from typing import Any

from rltrain.functions import explain, load_function
from rltrain.rewards import service as rewards
from rltrain.rollout.http import GenerationError
from rltrain.rollout.single_turn import generate
from rltrain.sample import Sample

SamplingParams = dict[str, Any]


async def generate_and_grade(
    args: argparse.Namespace,
    samples: list[Sample],
    rollout_id: int,
    params: SamplingParams,
    *,
    evaluation: bool = False,
) -> dict[str, float]:
    """Fill all samples in place, each by itself; returns where the time went, as metrics.

    `perf/generate_s` ends with the last response; `perf/reward_s` is what the rewards take after that.

    Raises:
        RuntimeError: not one sample could be generated and graded.
    """
    engines = args.rollout_num_gpus // args.rollout_num_gpus_per_engine
    semaphore = asyncio.Semaphore(args.sglang_server_concurrency * engines)
    function = generation_function(args)
    takes_evaluation = "evaluation" in inspect.signature(function).parameters
    extra = {"evaluation": evaluation} if takes_evaluation else {}
    began = generated = time.perf_counter()

    async def fill(sample: Sample) -> None:
        nonlocal generated
        async with semaphore:
            await _generate_guarded(
                function, args, sample, with_seed(args, params, rollout_id, sample), extra
            )
        generated = time.perf_counter()
        if sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED) and sample.reward is None:
            await rewards.grade(args, sample)

    tasks = [asyncio.ensure_future(fill(sample)) for sample in samples]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # after an error: nobody waits for the others any more
    failures = [sample.failure for sample in samples if sample.status is Sample.Status.FAILED]
    if samples and len(failures) == len(samples):
        raise RuntimeError(f"all {len(samples)} samples failed, the first one with: {failures[0]}")
    return {"perf/generate_s": generated - began, "perf/reward_s": time.perf_counter() - generated}


async def _generate_guarded(
    function: Callable[..., Any],
    args: argparse.Namespace,
    sample: Sample,
    params: SamplingParams,
    extra: dict[str, Any],
) -> None:
    """Run the generation function; what it raises, or does wrong, fails this sample only."""
    began = time.perf_counter()
    prompt_tokens = list(sample.tokens)
    try:
        result = await function(args, sample, params, **extra)
        check_generated(result, sample, function)
    except Exception as error:
        sample.status = Sample.Status.FAILED
        sample.failure = str(error) if isinstance(error, GenerationError) else explain(error)
        sample.tokens, sample.response, sample.response_length = prompt_tokens, "", 0
        sample.loss_mask = sample.rollout_log_probs = None
    sample.generate_seconds = time.perf_counter() - began


def check_generated(result: Any, sample: Sample, function: Callable[..., Any]) -> None:
    """See that a generation function returned its sample, finished, with lists of the right lengths.

    Raises:
        GenerationError: names the function and what is wrong.
    """
    name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    if result is not sample:
        raise GenerationError(
            f"{name} returned a {type(result).__name__} and not the sample that it was given"
        )
    if sample.status is Sample.Status.PENDING:
        raise GenerationError(f"{name} left the sample's status at PENDING")
    if not 0 <= sample.response_length <= len(sample.tokens):
        raise GenerationError(
            f"{name}: response_length {sample.response_length} with {len(sample.tokens)} tokens"
        )
    for field in ("loss_mask", "rollout_log_probs"):
        values = getattr(sample, field)
        if values is not None and len(values) != sample.response_length:
            raise GenerationError(
                f"{name}: {field} has {len(values)} entries for {sample.response_length} response tokens"
            )


def generation_function(args: argparse.Namespace) -> Callable[..., Any]:
    """`--custom-generate-function-path`, or the default `generate`.

    Raises:
        UserError: it can't be loaded.
    """
    path = args.custom_generate_function_path
    return load_function(path, flag="--custom-generate-function-path") if path else generate


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """SGLang's sampling parameters for training rollouts."""
    return {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len,
        "stop": args.rollout_stop,
        "stop_token_ids": args.rollout_stop_token_ids,
        "skip_special_tokens": args.rollout_skip_special_tokens,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


def with_seed(
    args: argparse.Namespace, params: SamplingParams, rollout_id: int, sample: Sample
) -> SamplingParams:
    """With deterministic engines: a seed for the sample alone, so that a run can be repeated token for token."""
    if not args.sglang.get("enable_deterministic_inference"):
        return params
    name = f"{args.rollout_seed}/{rollout_id}/{sample.index}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1
    return {**params, "sampling_seed": seed}
