"""Groups of samples: generated with bounded concurrency, graded as soon as each sample or group is there."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import inspect
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from rltrain.arguments.errors import UserError
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
    """Fill all samples in place, those with the same `group_index` as a group; returns where the time went.

    `perf/generate_s` ends with the last response; `perf/reward_s` is what the rewards take after that.

    Raises:
        RuntimeError: more than --max-failed-fraction of the samples failed, or all.
    """
    groups: dict[int | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    runner = GroupRunner(args, rollout_id, params, evaluation=evaluation)
    await gather_or_cancel([asyncio.ensure_future(runner.run(group)) for group in groups.values()])
    check_failures(args, samples)
    return runner.seconds()


class GroupRunner:
    """Generates and grades groups of samples, with as many requests in flight as the engines should have."""

    def __init__(
        self, args: argparse.Namespace, rollout_id: int, params: SamplingParams, *, evaluation: bool = False
    ) -> None:
        self._args, self._rollout_id, self._params, self._evaluation = args, rollout_id, params, evaluation
        engines = args.rollout_num_gpus // args.rollout_num_gpus_per_engine
        self._semaphore = asyncio.Semaphore(args.sglang_server_concurrency * engines)
        self._hooks = [
            load_function(path, flag="--rollout-sample-hook-path") for path in args.rollout_sample_hook_path
        ]
        self.aborting = False  # from now on, nothing new is asked of the engines
        self._began = self._generated = time.perf_counter()

    async def run(self, group: list[Sample]) -> list[Sample]:
        """Fill the samples of a group in place, and return them."""
        await gather_or_cancel([asyncio.ensure_future(self._fill(sample)) for sample in group])
        if self._args.group_rm and all(sample.status is not Sample.Status.ABORTED for sample in group):
            await rewards.grade_group(self._args, [sample for sample in group if _to_be_graded(sample)])
        return group

    def seconds(self) -> dict[str, float]:
        """Where the time went since this was made, if all groups are done."""
        now = time.perf_counter()
        return {"perf/generate_s": self._generated - self._began, "perf/reward_s": now - self._generated}

    async def _fill(self, sample: Sample) -> None:
        if sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED):
            async with self._semaphore:
                if self.aborting:
                    sample.status = Sample.Status.ABORTED
                    return
                await self._generate_guarded(sample)
        self._generated = time.perf_counter()
        if _to_be_graded(sample) and not self._args.group_rm:
            await rewards.grade(self._args, sample)

    async def _generate_guarded(self, sample: Sample) -> None:
        """Run the generation function and the hooks; what they raise, or do wrong, fails this sample only."""
        began = time.perf_counter()
        prompt_tokens = sample.tokens[: sample.prompt_length]
        if sample.response_length and self._args.mask_offpolicy_in_partial_rollout:
            sample.loss_mask = [0] * sample.response_length
        try:
            await self._generate(sample)
        except UserError:
            raise
        except Exception as error:
            sample.status = Sample.Status.FAILED
            sample.failure = str(error) if isinstance(error, GenerationError) else explain(error)
            sample.tokens, sample.response, sample.response_length = prompt_tokens, "", 0
            sample.loss_mask = sample.rollout_log_probs = None
        sample.generate_seconds += time.perf_counter() - began

    async def _generate(self, sample: Sample) -> None:
        function = generation_function(self._args, sample)
        params = with_seed(self._args, self._params, self._rollout_id, sample)
        own = sample.metadata.get("sampling_params") if isinstance(sample.metadata, dict) else None
        extra = accepted_keywords(function, {"evaluation": self._evaluation})
        result = await function(self._args, sample, {**params, **(own or {})}, **extra)
        check_generated(result, sample, function)
        for hook in self._hooks:
            extra = accepted_keywords(hook, {"rollout_id": self._rollout_id, "evaluation": self._evaluation})
            result = hook(self._args, sample, **extra)
            if inspect.isawaitable(result):
                result = await result
            check_generated(sample if result is None else result, sample, hook)


def _to_be_graded(sample: Sample) -> bool:
    finished = sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)
    return finished and sample.reward is None


async def gather_or_cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """Wait for all tasks; after an error, or when cancelled, nobody waits for the others: cancel them."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def check_failures(args: argparse.Namespace, samples: list[Sample]) -> None:
    """See that enough samples of a batch are usable.

    Raises:
        RuntimeError: more than --max-failed-fraction of them failed, or all; the message has the reasons.
    """
    failures = Counter(
        sample.failure or "no reason given" for sample in samples if sample.status is Sample.Status.FAILED
    )
    failed = failures.total()
    if not failed or (failed < len(samples) and failed <= args.max_failed_fraction * len(samples)):
        return
    if failed == len(samples):
        raise RuntimeError(f"all {failed} samples failed, the first one with: {next(iter(failures))}")
    reasons = "; ".join(f"{count} × {reason}" for reason, count in failures.most_common(3))
    raise RuntimeError(
        f"{failed} of {len(samples)} samples failed, more than --max-failed-fraction"
        f" {args.max_failed_fraction:g} allows: {reasons}"
    )


def accepted_keywords(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the function has a parameter for."""
    return {name: value for name, value in keywords.items() if name in _parameters(function)}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


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


def generation_function(args: argparse.Namespace, sample: Sample) -> Callable[..., Any]:
    """The sample's own function, or `--custom-generate-function-path`, or the default `generate`.

    Raises:
        UserError: it can't be loaded.
    """
    path = sample.generate_function_path or args.custom_generate_function_path
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
