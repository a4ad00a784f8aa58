"""A batch of groups, collected while a filter may drop some of them: sampled until there are enough."""

from __future__ import annotations

import argparse
import asyncio
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rltrain.data.source import RolloutDataSource
from rltrain.functions import load_function
from rltrain.rollout.batch import GroupRunner, sampling_params
from rltrain.rollout.filters import DynamicFilterOutput
from rltrain.rollout.http import get, post
from rltrain.rollout.shared import abort_lock
from rltrain.sample import Sample

_FLAG = "--dynamic-sampling-filter-path"
_ABORT_AGAIN = 1.0  # seconds
_MOST_DROPPED = 20  # batches: a filter that drops more than that will drop everything


@dataclass(frozen=True)
class Collected:
    """Finished groups in the order of their prompts."""

    kept: list[list[Sample]]
    all: list[list[Sample]]
    metrics: dict[str, float]


async def collect(args: argparse.Namespace, rollout_id: int, data_source: RolloutDataSource) -> Collected:
    """`--rollout-batch-size` groups that the filter keeps, from waves of `--over-sampling-batch-size` prompts.

    As soon as there are enough, what is still being generated is stopped; it goes back to the data source, to
    come first the next time: it is what has long responses, which must not be lost. With `--partial-rollout`
    the tokens that are there are kept, and gone on with; else those prompts begin anew.

    Raises:
        RuntimeError: the filter drops too much; says what was dropped for which reason.
    """
    path = args.dynamic_sampling_filter_path
    keep = load_function(path, flag=_FLAG) if path else None
    samples_more = keep is not None or args.over_sampling_batch_size != args.rollout_batch_size
    runner = GroupRunner(args, rollout_id, sampling_params(args))
    running: dict[asyncio.Task[list[Sample]], list[Sample]] = {}
    kept: list[list[Sample]] = []
    finished: list[list[Sample]] = []
    dropped: Counter[str] = Counter()
    given_back: list[list[Sample]] = []
    ended: asyncio.Queue[asyncio.Task[list[Sample]]] = asyncio.Queue()
    try:
        while len(kept) < args.rollout_batch_size:
            if len(kept) + len(running) < args.rollout_batch_size:
                for group in data_source.get_samples(args.over_sampling_batch_size):
                    task = asyncio.create_task(runner.run(group))
                    task.add_done_callback(ended.put_nowait)  # waiting for the first of many is slow
                    running[task] = [_unused(sample) for sample in group] if samples_more else group
            done = [await ended.get()]
            while not ended.empty():
                done.append(ended.get_nowait())
            for task in sorted(done, key=lambda task: _first_index(running[task])):
                del running[task]
                group = task.result()
                finished.append(group)
                verdict = judge(keep, args, group)
                if not verdict.keep:
                    dropped[verdict.reason or "no reason"] += 1
                elif len(kept) < args.rollout_batch_size:
                    kept.append(group)
            _check_drops(args, len(kept), dropped)
        if args.partial_rollout and running:
            given_back = await stop_early(args, rollout_id, runner, running)
        else:
            given_back = list(running.values())
    finally:
        for task in running:
            task.cancel()
    if running:
        await asyncio.gather(*running, return_exceptions=True)
    if given_back:
        data_source.add_samples(sorted(given_back, key=_first_index))
    continued = sum("start_rollout_id" in sample.metadata for group in kept for sample in group)
    metrics = {f"rollout/dynamic_filter/drop_{reason}": float(n) for reason, n in dropped.items()}
    if keep is not None:
        metrics["rollout/dynamic_filter/kept_ratio"] = len(kept) / (len(kept) + dropped.total())
    if args.partial_rollout:
        metrics["rollout/partial/continued"] = float(continued)
        metrics["rollout/partial/given_back"] = float(len(given_back))
    return Collected(
        sorted(kept, key=_first_index), sorted(finished, key=_first_index), runner.metrics() | metrics
    )


async def stop_early(
    args: argparse.Namespace,
    rollout_id: int,
    runner: GroupRunner,
    running: dict[asyncio.Task[list[Sample]], list[Sample]],
) -> list[list[Sample]]:
    """End what is being generated and return it with the tokens that it has; `running` is empty then.

    Engines are told again until nothing runs any more: a generation function of several turns may have sent
    a request in between.
    """
    runner.aborting = True
    router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
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
                group = begun  # a rollout of several samples begins anew
            for sample in group:
                if sample.response_length:
                    sample.metadata.setdefault("start_rollout_id", rollout_id)
            stopped.append(group)
    return stopped


def judge(
    keep: Callable[..., Any] | None, args: argparse.Namespace, group: list[Sample]
) -> DynamicFilterOutput:
    """The filter's verdict on a group; True and False are taken too, as slime does.

    Raises:
        RuntimeError: it returned something else.
    """
    if keep is None:
        return DynamicFilterOutput(True)
    verdict = keep(args, group)
    if isinstance(verdict, bool):
        return DynamicFilterOutput(verdict)
    if not isinstance(getattr(verdict, "keep", None), bool):
        raise RuntimeError(
            f"{_FLAG} {args.dynamic_sampling_filter_path} returned {verdict!r}, where a DynamicFilterOutput or a"
            " bool is wanted"
        )
    return DynamicFilterOutput(verdict.keep, getattr(verdict, "reason", None))


def _check_drops(args: argparse.Namespace, kept: int, dropped: Counter[str]) -> None:
    if dropped.total() <= _MOST_DROPPED * args.rollout_batch_size:
        return
    reasons = ", ".join(f"{count} × {reason}" for reason, count in dropped.most_common())
    raise RuntimeError(
        f"{_FLAG} {args.dynamic_sampling_filter_path} dropped {dropped.total()} groups and kept {kept}, of the"
        f" {args.rollout_batch_size} that a batch needs ({reasons}). Give other prompts, or another filter."
    )


def _unused(sample: Sample) -> Sample:
    """The sample as it is now, untouched by what is generated for the other."""
    unused = copy.copy(sample)
    for name in ("tokens", "loss_mask", "rollout_log_probs", "weight_versions", "weight_version_spans"):
        if (value := getattr(sample, name)) is not None:
            setattr(unused, name, list(value))
    unused.metadata = copy.deepcopy(sample.metadata) if sample.metadata else {}
    return unused


def _first_index(group: list[Sample]) -> int:
    return group[0].index or 0
