"""A batch of groups: prompts are sampled until a filter has kept enough of them."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.rollout import Rollout
from rltrain.data.source import RolloutDataSource
from rltrain.functions import load_function
from rltrain.rollout.filters import DynamicFilterOutput
from rltrain.rollout.generate.group import GroupRunner
from rltrain.rollout.generate.http import get, post
from rltrain.rollout.generate.single_turn import sampling_params
from rltrain.sample import Sample

_FLAG = "--dynamic-sampling-filter-path"
_ABORT_AGAIN = 1.0  # seconds
_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
Running = dict[asyncio.Task[list[Sample]], list[Sample]]
_MOST_DROPPED = 20  # batches: a filter that drops more than that will drop everything


@dataclass(frozen=True)
class Collected:
    """Finished groups in the order of their prompts."""

    kept: list[list[Sample]]
    all: list[list[Sample]]
    metrics: dict[str, float]


async def collect(config: Config, rollout_id: int, data_source: RolloutDataSource) -> Collected:
    """`--rollout-batch-size` groups that the filter keeps, from waves of `--over-sampling-batch-size` prompts.

    As soon as there are enough, what is still being generated is stopped; it goes back to the data source, to
    come first the next time: these are the long responses, which must not be lost. With `--partial-rollout`
    the present tokens are kept and continued; otherwise these prompts start over.

    Raises:
        RuntimeError: the filter drops too much; says what was dropped for which reason.
    """
    wave = _Wave(config, rollout_id)
    given_back: list[list[Sample]] = []
    try:
        while not wave.is_full:
            if wave.lacks_prompts:
                wave.begin(data_source.get_samples(config.rollout.over_sampling_batch_size))
            await wave.take_finished()
        if config.rollout.partial_rollout and wave.running:
            args = config.namespace  # has the router of now, should it have been started again
            router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
            given_back = await stop_early(router, rollout_id, wave.runner, wave.running)
        else:
            given_back = list(wave.running.values())
    finally:
        for task in wave.running:
            task.cancel()
    if wave.running:
        await asyncio.gather(*wave.running, return_exceptions=True)
    if given_back:
        data_source.add_samples(sorted(given_back, key=_first_index))
    return Collected(
        sorted(wave.kept, key=_first_index),
        sorted(wave.finished, key=_first_index),
        wave.runner.metrics() | wave.metrics(len(given_back)),
    )


class _Wave:
    """The groups of one batch: those that are being generated, and what has become of the finished ones.

    Attributes:
        running: with each the group as it goes back, if it does not finish.
    """

    def __init__(self, config: Config, rollout_id: int) -> None:
        self._config, self._rollout = config, config.rollout
        path = config.functions.dynamic_sampling_filter_path
        self._keep = load_function(path, flag=_FLAG) if path else None
        self._ended: asyncio.Queue[asyncio.Task[list[Sample]]] = asyncio.Queue()
        self._dropped: Counter[str] = Counter()
        self.runner = GroupRunner(config, rollout_id, sampling_params(config.rollout))
        self.running: Running = {}
        self.kept: list[list[Sample]] = []
        self.finished: list[list[Sample]] = []

    @property
    def is_full(self) -> bool:
        return len(self.kept) >= self._rollout.rollout_batch_size

    @property
    def lacks_prompts(self) -> bool:
        return len(self.kept) + len(self.running) < self._rollout.rollout_batch_size

    def begin(self, groups: list[list[Sample]]) -> None:
        """Have further groups generated."""
        samples_more = (
            self._keep is not None
            or self._rollout.over_sampling_batch_size != self._rollout.rollout_batch_size
        )
        for group in groups:
            task = asyncio.create_task(self.runner.run(group))
            task.add_done_callback(self._ended.put_nowait)  # waiting for the first of many is slow
            self.running[task] = [_unused(sample) for sample in group] if samples_more else group

    async def take_finished(self) -> None:
        """Wait for at least one group; the filter looks at all that have finished, in the order of their prompts.

        Raises:
            RuntimeError: the filter drops too much.
        """
        done = [await self._ended.get()]
        while not self._ended.empty():
            done.append(self._ended.get_nowait())
        for task in sorted(done, key=lambda task: _first_index(self.running[task])):
            del self.running[task]
            group = task.result()
            self.finished.append(group)
            verdict = judge(self._keep, self._config, group)
            enough_without = not self.lacks_prompts
            if not verdict.keep and (enough_without or not verdict.keep_when_insufficient):
                self._dropped[verdict.reason or "no reason"] += 1
            elif not self.is_full:
                self.kept.append(group)
        _check_drops(self._config.functions, self._rollout, len(self.kept), self._dropped)

    def metrics(self, given_back: int) -> dict[str, float]:
        """What was dropped, kept and, with --partial-rollout, continued and set aside."""
        metrics = {f"rollout/dynamic_filter/drop_{reason}": float(n) for reason, n in self._dropped.items()}
        if self._keep is not None:
            total = len(self.kept) + self._dropped.total()
            metrics["rollout/dynamic_filter/kept_ratio"] = len(self.kept) / total
        if self._rollout.partial_rollout:
            samples = [sample for group in self.kept for sample in group]
            continued = sum("start_rollout_id" in sample.metadata for sample in samples)
            metrics["rollout/partial/continued"] = float(continued)
            metrics["rollout/partial/given_back"] = float(given_back)
        return metrics


async def stop_early(
    router: str, rollout_id: int, runner: GroupRunner, running: Running
) -> list[list[Sample]]:
    """End what is being generated and return it with the tokens that it has; `running` is empty then.

    The request to engines is repeated until nothing runs any more: a generation function of several turns may have sent
    a request in between.
    """
    runner.aborting = True
    stopped: list[list[Sample]] = []
    while running:
        workers = (await get(f"{router}/workers"))["workers"]
        async with abort_lock():
            await asyncio.gather(
                *(
                    post(f"{worker['url']}/abort_request", {"rid": "", "abort_all": True})
                    for worker in workers
                )
            )
        done, _ = await asyncio.wait(running, timeout=_ABORT_AGAIN)
        for task in done:
            begun = running.pop(task)
            group = task.result()
            if [sample.index for sample in group] != [sample.index for sample in begun]:
                group = begun  # a rollout of several samples starts over
            for sample in group:
                if sample.response_length:
                    sample.metadata.setdefault("start_rollout_id", rollout_id)
            stopped.append(group)
    return stopped


def abort_lock() -> asyncio.Lock:
    """Held by an evaluation, and by a rollout that aborts all requests of the engines: they must not meet."""
    return _locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def judge(keep: Callable[..., Any] | None, config: Config, group: list[Sample]) -> DynamicFilterOutput:
    """The filter's verdict on a group; True and False are taken too, as slime does, also of NumPy and torch.

    Raises:
        RuntimeError: it returned something else.
    """
    if keep is None:
        return DynamicFilterOutput(True)
    verdict = keep(config.namespace, group)
    if isinstance(_plain(verdict), bool):
        return DynamicFilterOutput(_plain(verdict))
    kept = _plain(getattr(verdict, "keep", None))
    if not isinstance(kept, bool):
        raise RuntimeError(
            f"{_FLAG} {config.functions.dynamic_sampling_filter_path} returned {verdict!r};"
            " expected a DynamicFilterOutput or a bool"
        )
    fallback = bool(getattr(verdict, "keep_when_insufficient", False))
    return DynamicFilterOutput(kept, getattr(verdict, "reason", None), fallback)


def _plain(value: Any) -> Any:
    """The bool in an array or a tensor of one."""
    return value.item() if hasattr(value, "item") else value


def _check_drops(functions: Functions, rollout: Rollout, kept: int, dropped: Counter[str]) -> None:
    if dropped.total() <= _MOST_DROPPED * rollout.rollout_batch_size:
        return
    reasons = ", ".join(f"{count} × {reason}" for reason, count in dropped.most_common())
    raise RuntimeError(
        f"{_FLAG} {functions.dynamic_sampling_filter_path} dropped {dropped.total()} groups and"
        f" kept {kept}, of the {rollout.rollout_batch_size} that a batch needs ({reasons}). Give other prompts,"
        " or another filter."
    )


def _unused(sample: Sample) -> Sample:
    """A copy that keeps the sample's present state while the original is generated."""
    unused = copy.copy(sample)
    for name in ("tokens", "loss_mask", "rollout_log_probs", "weight_versions", "weight_version_spans"):
        if (value := getattr(sample, name)) is not None:
            setattr(unused, name, list(value))
    unused.spec_info, unused.prefix_cache_info = (
        copy.copy(sample.spec_info),
        copy.copy(sample.prefix_cache_info),
    )
    unused.metadata = copy.deepcopy(sample.metadata) if sample.metadata else {}
    return unused


def _first_index(group: list[Sample]) -> int:
    return group[0].index or 0
