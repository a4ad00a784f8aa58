"""Groups of samples: generated with bounded concurrency, and graded as soon as each sample or group is complete."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rltrain.arguments.config import Config
from rltrain.arguments.external import count_external
from rltrain.arguments.fleet import engine_specs, trained_model
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.rollout import Rollout
from rltrain.functions import explain_fully, load_function
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate import timing
from rltrain.rollout.generate.http import GenerationError
from rltrain.rollout.generate.returned import as_rollout, check_sample, name_of
from rltrain.rollout.generate.single_turn import SamplingParams, generate, with_seed
from rltrain.rollout.generate.staleness import StalenessGuard, largest_age, mask_earlier
from rltrain.run.errors import UserError
from rltrain.sample import Sample

T = TypeVar("T")

_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Semaphore]] = WeakKeyDictionary()


async def generate_and_grade(
    config: Config,
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
    runner = GroupRunner(config, rollout_id, params, evaluation=evaluation)
    tasks = [asyncio.ensure_future(runner.run(group)) for group in groups.values()]
    samples[:] = [sample for group in await gather_or_cancel(tasks) for sample in group]
    check_failures(config.rollout, samples)
    return runner.metrics()


class GroupRunner:
    """Generates and grades groups of samples, with as many requests in flight as the engines should have."""

    def __init__(
        self, config: Config, rollout_id: int | None, params: SamplingParams, *, evaluation: bool = False
    ) -> None:
        """Groups of rollout `rollout_id`; where it is None, nothing is too old."""
        self._config, self._rollout_id, self._params, self._evaluation = (
            config,
            rollout_id,
            params,
            evaluation,
        )
        # The trainer waits for evaluations: they need not queue up behind rollouts that are for later.
        self._semaphore = (
            asyncio.Semaphore(slot_count(config.engines, config.debug))
            if evaluation
            else training_slots(config.engines, config.debug)
        )
        any_age = evaluation or rollout_id is None
        largest = math.inf if any_age else largest_age(config.rollout, config.weights)
        self._staleness = StalenessGuard(rollout_id or 0, largest)
        self._masks_earlier = config.rollout.mask_offpolicy_in_partial_rollout
        self._hooks = [
            load_function(path, flag="--rollout-sample-hook-path")
            for path in config.functions.rollout_sample_hook_path
        ]
        path = config.functions.custom_generate_function_path
        self._function = load_function(path, flag="--custom-generate-function-path") if path else generate
        self.aborting = False  # from now on, nothing new is asked of the engines
        self._began = self._generated = time.perf_counter()

    async def run(self, group: list[Sample]) -> list[Sample]:
        """Fill the samples of a group; returns them, or those that a rollout became in place of its sample."""
        return [sample for rollout in await self.run_rollouts(group) for sample in rollout]

    async def run_rollouts(self, group: list[Sample]) -> list[list[Sample]]:
        """The same, with one list for each sample of the group."""
        rollouts = await gather_or_cancel([asyncio.create_task(self.fill(sample)) for sample in group])
        filled = [sample for rollout in rollouts for sample in rollout]
        if self._config.rewards.group_rm and not _is_aborted(filled):
            await rewards.grade_group(self._config, [sample for sample in filled if _to_be_graded(sample)])
        return rollouts

    def metrics(self) -> dict[str, float]:
        """Where the time went since this was made, if all groups are done; what was too old."""
        now = time.perf_counter()
        seconds = {"perf/generate_s": self._generated - self._began, "perf/reward_s": now - self._generated}
        return seconds | self._staleness.metrics()

    async def fill(self, sample: Sample) -> list[Sample]:
        """One sample generated and, without --group-rm, graded; or those that its rollout became."""
        samples = [sample]
        self._staleness.begin_anew(sample)  # it may come from a rollout before
        earlier = list(sample.tokens) if sample.response_length and self._masks_earlier else []
        mask_earlier(samples, earlier)
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
        mask_earlier(samples, earlier)  # whatever the function has done to the mask
        self._generated = time.perf_counter()
        if not self._config.rewards.group_rm and not _is_aborted(samples):
            to_grade = [rewards.grade(self._config, each) for each in samples if _to_be_graded(each)]
            if len(to_grade) == 1:
                await to_grade[0]
            elif to_grade:
                await gather_or_cancel([asyncio.ensure_future(each) for each in to_grade])
        return samples

    async def _generate_fresh(self, sample: Sample, waited: float) -> list[Sample]:
        """Generate, and once more if the weights turn out to be too old."""
        staleness = self._staleness
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
        times = timing.start_clock()
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
            sample.rollout_routed_experts = None
            sample.metadata = metadata
            samples = [sample]
        times.write_to(samples, waited)
        return samples

    async def _generate(self, sample: Sample) -> list[Sample]:
        config = self._config
        params = with_seed(config.engines, config.rollout, self._params, self._rollout_id, sample)
        own = sample.metadata.get("sampling_params")
        if own is not None and not isinstance(own, dict):
            raise GenerationError(f"metadata sampling_params is {own!r:.200}; expected a dict")
        if sample.session_id is None:
            sample.session_id = f"{self._rollout_id}-{sample.index}"
        params = {**params, **own} if own else dict(params)
        path = sample.generate_function_path
        function = load_function(path, flag="generate_function_path") if path else self._function
        if function is generate:  # what it makes is known to be in order
            samples = [await generate(self._config.namespace, sample, params)]
        else:
            extra = accepted_keywords(function, {"evaluation": self._evaluation})
            result = await function(self._config.namespace, sample, params, **extra)
            samples = as_rollout(self._config.rewards, result, sample, function)
        if self._hooks:
            await self._run_hooks(samples)
        return samples

    async def _run_hooks(self, samples: list[Sample]) -> None:
        for hook in self._hooks:
            extra = accepted_keywords(hook, {"rollout_id": self._rollout_id, "evaluation": self._evaluation})
            for each in samples:
                result = hook(self._config.namespace, each, **extra)
                if inspect.isawaitable(result):
                    result = await result
                check_sample(self._config.rewards, each if result is None else result, each, name_of(hook))


def training_slots(engines: Engines, debug: Debug) -> asyncio.Semaphore:
    """A place for each request that may be in flight, `--sglang-server-concurrency` an engine, for all rollouts.

    Who came first is served first, so the rollout that is trained on next is not held up by those after it.
    """
    count = slot_count(engines, debug)
    return _slots.setdefault(asyncio.get_running_loop(), {}).setdefault(count, asyncio.Semaphore(count))


def slot_count(engines: Engines, debug: Debug) -> int:
    """How many requests may be in flight."""
    served, trained = engine_specs(engines, debug), trained_model(engines)
    own = sum(spec.model == trained and spec.worker_type != "prefill" for spec in served)
    return engines.sglang_server_concurrency * max(1, own + count_external(engines))


def _is_aborted(samples: list[Sample]) -> bool:
    return any(sample.status is Sample.Status.ABORTED for sample in samples)


def _to_be_graded(sample: Sample) -> bool:
    finished = sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED)
    return finished and sample.reward is None


async def gather_or_cancel(tasks: list[asyncio.Task[T]]) -> list[T]:
    """The results of all tasks. After an error, or when this is cancelled, the other tasks are cancelled."""
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def check_failures(rollout: Rollout, samples: list[Sample]) -> None:
    """Check that enough samples of a batch are usable.

    Raises:
        RuntimeError: more than --max-failed-fraction of them failed, or all; the message has the reasons.
    """
    failures = Counter(
        (sample.failure or "no reason given").splitlines()[0]
        for sample in samples
        if sample.status is Sample.Status.FAILED
    )
    failed = failures.total()
    if not failed or (failed < len(samples) and failed <= rollout.max_failed_fraction * len(samples)):
        return
    if failed == len(samples):
        raise RuntimeError(f"all {failed} samples failed; the first error: {next(iter(failures))}")
    reasons = "; ".join(f"{count} × {reason}" for reason, count in failures.most_common(3))
    raise RuntimeError(
        f"{failed} of {len(samples)} samples failed, more than --max-failed-fraction"
        f" {rollout.max_failed_fraction:g} allows: {reasons}"
    )


def accepted_keywords(function: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords for which the function has a parameter."""
    return {name: value for name, value in keywords.items() if name in _parameters(function)}


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
