"""Groups of samples: generated with bounded concurrency, graded as soon as each sample or group is there."""

from __future__ import annotations

import argparse
import asyncio
import copy
import hashlib
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from rltrain.arguments.errors import UserError
from rltrain.functions import explain_fully, load_function
from rltrain.rewards import service as rewards
from rltrain.rollout import request_times
from rltrain.rollout.generated import as_rollout, check_sample, name_of
from rltrain.rollout.http import GenerationError
from rltrain.rollout.shared import slot_count, training_slots
from rltrain.rollout.single_turn import generate
from rltrain.rollout.staleness import StalenessGuard, largest_age
from rltrain.sample import Sample

T = TypeVar("T")
SamplingParams = dict[str, Any]


async def generate_and_grade(
    args: argparse.Namespace,
    samples: list[Sample],
    rollout_id: int,
    params: SamplingParams,
    *,
    evaluation: bool = False,
) -> dict[str, float]:
    """Fill all samples, those with the same `group_index` as a group; returns where the time went.

    The list itself changes where a rollout becomes several samples.

    `perf/generate_s` ends with the last response; `perf/reward_s` is what the rewards take after that.

    Raises:
        RuntimeError: more than --max-failed-fraction of the samples failed, or all.
    """
    groups: dict[int | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    runner = GroupRunner(args, rollout_id, params, evaluation=evaluation)
    tasks = [asyncio.ensure_future(runner.run(group)) for group in groups.values()]
    samples[:] = [sample for group in await gather_or_cancel(tasks) for sample in group]
    check_failures(args, samples)
    return runner.metrics()


class GroupRunner:
    """Generates and grades groups of samples, with as many requests in flight as the engines should have."""

    def __init__(
        self, args: argparse.Namespace, rollout_id: int, params: SamplingParams, *, evaluation: bool = False
    ) -> None:
        self._args, self._rollout_id, self._params, self._evaluation = args, rollout_id, params, evaluation
        # The trainer waits for evaluations: they need not queue up behind rollouts that are for later.
        self._semaphore = asyncio.Semaphore(slot_count(args)) if evaluation else training_slots(args)
        self._staleness = StalenessGuard(rollout_id, math.inf if evaluation else largest_age(args))
        self._hooks = [
            load_function(path, flag="--rollout-sample-hook-path") for path in args.rollout_sample_hook_path
        ]
        path = args.custom_generate_function_path
        self._function = load_function(path, flag="--custom-generate-function-path") if path else generate
        self.aborting = False  # from now on, nothing new is asked of the engines
        self._began = self._generated = time.perf_counter()

    async def run(self, group: list[Sample]) -> list[Sample]:
        """Fill the samples of a group; returns them, or those that a rollout became in the place of its sample."""
        tasks = [asyncio.create_task(self._fill(sample)) for sample in group]
        filled = [sample for rollout in await gather_or_cancel(tasks) for sample in rollout]
        if self._args.group_rm and not _is_aborted(filled):
            await rewards.grade_group(self._args, [sample for sample in filled if _to_be_graded(sample)])
        return filled

    def metrics(self) -> dict[str, float]:
        """Where the time went since this was made, if all groups are done; what was too old."""
        now = time.perf_counter()
        seconds = {"perf/generate_s": self._generated - self._began, "perf/reward_s": now - self._generated}
        return seconds | self._staleness.metrics()

    async def _fill(self, sample: Sample) -> list[Sample]:
        samples = [sample]
        if sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED):
            waits_since = time.perf_counter()
            async with self._semaphore:
                if self.aborting:
                    sample.status = Sample.Status.ABORTED
                    return samples
                waited = time.perf_counter() - waits_since
                if self._staleness.watches:
                    samples = await self._generate_fresh(sample, waited)
                else:
                    samples = await self._generate_guarded(sample, waited)
        self._generated = time.perf_counter()
        if not self._args.group_rm and not _is_aborted(samples):
            to_grade = [rewards.grade(self._args, each) for each in samples if _to_be_graded(each)]
            if len(to_grade) == 1:
                await to_grade[0]
            elif to_grade:
                await gather_or_cancel([asyncio.ensure_future(each) for each in to_grade])
        return samples

    async def _generate_fresh(self, sample: Sample, waited: float) -> list[Sample]:
        """Generate, and once more if the weights turn out to be too old."""
        staleness = self._staleness
        staleness.begin_anew(sample)  # it may come from a rollout before
        spare = copy.deepcopy(sample)
        samples = await self._generate_guarded(sample, waited)
        if staleness.any_too_old(samples) and not self.aborting:
            staleness.regenerated += 1
            samples = await self._generate_guarded(spare, 0.0)
        staleness.drop(samples)
        return samples

    async def _generate_guarded(self, sample: Sample, waited: float) -> list[Sample]:
        """Run the generation function and the hooks; what they raise, or do wrong, fails this sample only."""
        prompt_tokens, metadata = sample.tokens[: sample.prompt_length], dict(sample.metadata)
        if sample.response_length and self._args.mask_offpolicy_in_partial_rollout:
            sample.loss_mask = [0] * sample.response_length
        times = request_times.start()
        try:
            samples = await self._generate(sample)
        except UserError:
            raise
        except Exception as error:
            sample.status, sample.reward = Sample.Status.FAILED, None
            sample.failure = str(error) if isinstance(error, GenerationError) else explain_fully(error)
            sample.tokens, sample.response, sample.response_length = prompt_tokens, "", 0
            sample.loss_mask = sample.rollout_log_probs = sample.teacher_log_probs = None
            sample.weight_versions, sample.weight_version_spans = [], []
            sample.metadata = metadata
            samples = [sample]
        times.write_to(samples, waited)
        return samples

    async def _generate(self, sample: Sample) -> list[Sample]:
        params = with_seed(self._args, self._params, self._rollout_id, sample)
        own = sample.metadata.get("sampling_params")
        if own is not None and not isinstance(own, dict):
            raise GenerationError(f"metadata sampling_params is {own!r:.200}, where a dict is wanted")
        if sample.session_id is None:
            sample.session_id = f"{self._rollout_id}-{sample.index}"
        params = {**params, **own} if own else dict(params)
        path = sample.generate_function_path
        function = load_function(path, flag="generate_function_path") if path else self._function
        if function is generate:  # what it makes is known to be in order
            samples = [await generate(self._args, sample, params)]
        else:
            extra = accepted_keywords(function, {"evaluation": self._evaluation})
            result = await function(self._args, sample, params, **extra)
            samples = as_rollout(self._args, result, sample, function)
        if self._hooks:
            await self._run_hooks(samples)
        return samples

    async def _run_hooks(self, samples: list[Sample]) -> None:
        for hook in self._hooks:
            extra = accepted_keywords(hook, {"rollout_id": self._rollout_id, "evaluation": self._evaluation})
            for each in samples:
                result = hook(self._args, each, **extra)
                if inspect.isawaitable(result):
                    result = await result
                check_sample(self._args, each if result is None else result, each, name_of(hook))


def _is_aborted(samples: list[Sample]) -> bool:
    return any(sample.status is Sample.Status.ABORTED for sample in samples)


def _to_be_graded(sample: Sample) -> bool:
    finished = sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)
    return finished and sample.reward is None


async def gather_or_cancel(tasks: list[asyncio.Task[T]]) -> list[T]:
    """The results of all tasks; after an error, or when cancelled, nobody waits for the others: cancel them."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def check_failures(args: argparse.Namespace, samples: list[Sample]) -> None:
    """See that enough samples of a batch are usable.

    Raises:
        RuntimeError: more than --max-failed-fraction of them failed, or all; the message has the reasons.
    """
    failures = Counter(
        (sample.failure or "no reason given").splitlines()[0]
        for sample in samples
        if sample.status is Sample.Status.FAILED
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
