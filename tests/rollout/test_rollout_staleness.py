"""Rollouts ahead of the trainer: how far, in which order, what is too old, and what a restart finds."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes.engine_server import FakeEngine, answer
from helpers.local_job import wait_until_async
from helpers.rollout import layout, manager, running

from rltrain.data.batch import TrainBatch
from rltrain.rollout.collect import abort_lock
from rltrain.rollout.generate.look_ahead import LookAhead
from rltrain.rollout.generate.single_turn import update_sample
from rltrain.rollout.generate.staleness import StalenessGuard, age_metrics
from rltrain.rollout.service.manager import RolloutManager
from rltrain.run.errors import UserError
from rltrain.sample import Sample, age
from rltrain.schema import read_metrics, read_table, samples_to_table


class Rollouts:
    """Stands in for the manager: rollouts that end when they are told to."""

    def __init__(self, *, takes_at_once: bool = True) -> None:
        self.started: list[int] = []
        self.finish: dict[int, asyncio.Event] = {}
        self._takes_at_once = takes_at_once

    async def generate(self, rollout_id: int, taken: asyncio.Event) -> int:
        self.started.append(rollout_id)
        if self._takes_at_once:
            taken.set()
        await self.finish.setdefault(rollout_id, asyncio.Event()).wait()
        return 100 + rollout_id

    def end(self, *rollout_ids: int) -> None:
        for each in rollout_ids:
            self.finish.setdefault(each, asyncio.Event()).set()


async def settle() -> None:
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def look_ahead(ahead: int, end: int = 100, **kwargs: bool) -> tuple[Rollouts, LookAhead[int]]:
    rollouts = Rollouts(**kwargs)
    return rollouts, LookAhead(rollouts.generate, ahead=ahead, end=end)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_rollouts_start_as_far_ahead_as_allowed_and_no_farther(ahead: int) -> None:
    async def use() -> None:
        rollouts, ahead_of = look_ahead(ahead, end=6)
        await ahead_of.restart(2)
        await settle()
        assert rollouts.started == []  # no weights yet
        for version in range(2, 6):
            await ahead_of.weights(version)
            await settle()
            assert rollouts.started == list(range(2, min(6, version + ahead + 1)))
            rollouts.end(version)
            assert await ahead_of.get(version) == 100 + version
        await ahead_of.close()

    asyncio.run(use())


def test_on_policy_a_rollout_starts_when_it_is_asked_for() -> None:
    async def use() -> None:
        rollouts, ahead = look_ahead(0)
        await ahead.restart(0)
        for rollout_id in range(3):
            await ahead.weights(rollout_id)
            await settle()
            assert rollouts.started == list(range(rollout_id))
            rollouts.end(rollout_id)
            assert await ahead.get(rollout_id) == 100 + rollout_id
            assert await ahead.get(rollout_id) == 100 + rollout_id  # the answer was lost on its way
        assert rollouts.started == [0, 1, 2]
        await ahead.close()

    asyncio.run(use())


def test_what_takes_prompts_all_the_time_is_not_overtaken() -> None:
    async def use() -> None:
        rollouts, ahead = look_ahead(3, takes_at_once=False)
        await ahead.restart(0)
        await ahead.weights(0)
        await settle()
        assert rollouts.started == [0]
        rollouts.end(0)
        await settle()
        assert rollouts.started == [0, 1]
        await ahead.close()

    asyncio.run(use())


def test_a_restart_gives_up_what_is_under_way() -> None:
    async def use() -> None:
        rollouts, ahead = look_ahead(1)
        await ahead.restart(0)
        await ahead.weights(0)
        waiting = asyncio.ensure_future(ahead.get(0))
        await settle()
        await ahead.restart(5)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await ahead.weights(5)
        await settle()
        assert rollouts.started == [0, 1, 5, 6]
        await ahead.close()

    asyncio.run(use())


def test_the_error_of_an_early_rollout_comes_when_it_is_asked_for() -> None:
    async def use() -> None:
        async def generate(rollout_id: int, taken: asyncio.Event) -> int:
            if rollout_id == 1:
                raise RuntimeError("no prompts")
            return rollout_id

        ahead = LookAhead(generate, ahead=1, end=9)
        await ahead.restart(0)
        await ahead.weights(0)
        assert await ahead.get(0) == 0
        with pytest.raises(RuntimeError, match="no prompts"):
            await ahead.get(1)
        await ahead.close()

    asyncio.run(use())


def test_the_age_of_versions() -> None:
    assert age(7, []) is None
    assert age(7, ["7"]) == 0
    assert age(7, ["7", "5", "6"]) == 2
    assert age(7, ["7", "default"]) == math.inf


def span(version: int, start: int, end: int) -> dict[str, Any]:
    return {"version": str(version), "start": start, "end": end}


def test_staleness_is_averaged_over_tokens() -> None:
    samples = [
        Sample(weight_version_spans=[span(3, 0, 10), span(5, 10, 40)]),
        Sample(weight_version_spans=[span(4, 0, 20)]),
        Sample(),
    ]
    metrics = age_metrics(5, samples)
    assert metrics["rollout/staleness_mean"] == pytest.approx((2 * 10 + 0 * 30 + 1 * 20) / 60)
    assert metrics["rollout/staleness_max"] == 2
    assert age_metrics(5, [Sample()]) == {}


def test_spans_follow_one_another_over_turns_and_tools() -> None:
    sample = Sample(tokens=[5])
    for versions in ([("1", 0, 2), ("2", 2, 3)], [("2", 0, 3)]):
        output = answer({"sampling_params": {"max_new_tokens": 3}, "input_ids": [5]})
        output["meta_info"]["weight_versions"] = [span(int(v), start, end) for v, start, end in versions]
        update_sample(sample, output)
        sample.append_response_tokens(tokens=[9, 9], trainable=False)
    assert sample.weight_version_spans == [span(1, 0, 2), span(2, 2, 3), span(2, 5, 8)]
    assert sample.weight_versions == ["1", "2"]


def test_a_sample_that_is_too_old_is_begun_anew_and_then_dropped() -> None:
    guard = StalenessGuard(8, 2)
    sample = Sample(tokens=[1, 2])

    def write(version: str) -> None:
        sample.append_response_tokens(tokens=[5, 6, 7], log_probs=[-1.0] * 3)
        sample.response, sample.status, sample.weight_versions = "abc", Sample.Status.COMPLETED, [version]

    write("6")
    guard.begin_anew(sample)
    assert sample.response_length == 3
    sample.weight_versions = ["5"]
    guard.begin_anew(sample)
    assert (sample.tokens, sample.response_length, sample.weight_versions) == ([1, 2], 0, [])
    assert sample.status is Sample.Status.PENDING
    write("default")
    guard.drop([sample])
    assert sample.status is Sample.Status.FAILED and "version default" in str(sample.failure)
    assert guard.metrics() == {"rollout/staleness_regenerated": 1, "rollout/staleness_dropped": 1}
    assert StalenessGuard(8, math.inf).metrics() == {}


def test_only_fresh_samples_are_compared_with_the_engine() -> None:
    samples = [
        Sample(tokens=[1, 2, 3], response_length=2, rollout_log_probs=[-1.0, -2.0], weight_versions=versions)
        for versions in (["4"], ["3", "4"], [])
    ]
    table = samples_to_table(
        samples, step=4, attempt=0, dataset="train", rewards=[1.0] * 3, train_rewards=[0.0] * 3
    )
    batch = TrainBatch.from_arrow(table)
    assert batch.stale == [False, True, False]
    compared, given = batch.comparable_log_probs, batch.rollout_log_probs
    assert compared is not None and given is not None
    np.testing.assert_array_equal(compared[0], given[0])
    assert np.isnan(compared[1]).all() and np.isfinite(given[1]).all()


class VersionedEngine(FakeEngine):
    """Answers with the version that it was given last; holds requests back while `open` is not set."""

    version = "0"
    unknown = 0  # so many answers come from weights that nobody sent
    open: asyncio.Event | None = None

    def answer(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        output = answer(body, aborted=aborted)
        count, version = len(output["output_ids"]), "default" if self.unknown > 0 else self.version
        self.unknown -= 1
        output["meta_info"] |= {
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": count}],
        }
        return output

    async def before_answer(self, body: dict[str, Any]) -> None:
        if self.open is not None:
            await self.open.wait()


def start(config: Any, attempt: int = 0) -> tuple[RolloutManager, LookAhead[pa.Table]]:
    own = manager(config, attempt)
    return own, LookAhead(own.generate, ahead=config.rollout.max_staleness, end=config.rollout.num_rollout)


async def train(
    config: Any, steps: range, attempt: int = 0, then: Callable[[], Any] | None = None
) -> list[list[int]]:
    """What a trainer sees that pushes after every step: the indices of each batch."""
    async with running(config, VersionedEngine) as engine:
        rollouts, ahead = start(config, attempt)
        await ahead.restart(steps.start)
        rollouts.load(steps.start)
        seen = []
        for step in steps:
            engine.version = str(step)
            await ahead.weights(step)
            table = await ahead.get(step)
            assert read_metrics(table.schema)["rollout/staleness_max"] <= config.rollout.max_staleness
            seen.append(table["index"].to_pylist())
        if then is not None:
            await then()
        await ahead.close()
        return seen


async def until_on_disk(config: Any, rollout_id: int) -> None:
    await wait_until_async(lambda: layout(config).find_step(rollout_id))


@pytest.mark.parametrize("flags", [(), ("--over-sampling-batch-size", "6")], ids=["at-once", "one-by-one"])
def test_a_restart_takes_what_was_finished_early_without_gap_or_repeat(
    make_args: Any, flags: tuple[str, ...]
) -> None:
    config = make_args("--max-staleness", "2", "--num-rollout", "8", *flags)

    async def two_rollouts_ahead() -> None:
        await until_on_disk(config, 3)

    first = asyncio.run(train(config, range(2), then=two_rollouts_ahead))
    second = asyncio.run(train(config, range(2, 6), attempt=1))
    assert layout(config).find_step(3) == layout(config).step_dir(3, 0)  # made by the first attempt
    assert [index for batch in first + second for index in batch] == list(range(6 * 8))


def test_early_rollouts_that_are_too_old_for_a_smaller_bound_are_generated_anew(make_args: Any) -> None:
    wide = make_args("--max-staleness", "2", "--num-rollout", "8")
    asyncio.run(train(wide, range(1), then=lambda: until_on_disk(wide, 2)))
    config = make_args("--max-staleness", "1", "--num-rollout", "8")
    seen = asyncio.run(train(config, range(1, 3), attempt=1))
    assert layout(config).find_step(1) == layout(config).step_dir(1, 0)
    assert layout(config).find_step(2) == layout(config).step_dir(2, 1)
    assert seen == [list(range(8, 16)), list(range(16, 24))]


def test_an_engine_with_unknown_weights_costs_its_samples(make_args: Any) -> None:
    config = make_args("--max-staleness", "1", "--n-samples-per-prompt", "4", "--max-failed-fraction", "0.9")

    async def use() -> dict[str, float]:
        async with running(config, VersionedEngine) as engine:
            engine.unknown = 20  # answers to 16 samples, each of which is tried twice at most
            return read_metrics((await start(config)[0].generate(0)).schema)

    metrics = asyncio.run(use())
    regenerated, dropped = (metrics[f"rollout/staleness_{what}"] for what in ("regenerated", "dropped"))
    assert regenerated + dropped == 20 and dropped >= 4
    failures = [
        row["failure"] for row in read_table(layout(config).step_dir(0, 0)).to_pylist() if row["failure"]
    ]
    assert len(failures) == dropped and all("version default" in failure for failure in failures)


def test_evaluation_and_early_rollouts_do_not_mix(make_args: Any, prompt_file: Path) -> None:
    config = make_args(
        "--max-staleness", "1", "--eval-interval", "1", "--eval-prompt-data", "dev", f"{prompt_file}@[:5]"
    )

    async def use() -> None:
        async with running(config, VersionedEngine) as engine:
            rollouts, ahead = start(config)
            engine.open, engine.version = asyncio.Event(), "0"
            rollouts.load(0)
            await ahead.restart(0)
            await ahead.weights(0)
            evaluation = asyncio.ensure_future(rollouts.evaluate(0))
            await wait_until_async(lambda: len(engine.requests) >= 2 * 8 + 5)
            assert abort_lock().locked()  # a rollout that aborts has to wait
            engine.open.set()
            await evaluation
            assert not abort_lock().locked()
            await ahead.get(0)
            await ahead.get(1)
            await ahead.close()

    asyncio.run(use())
    files = layout(config)
    train = [read_table(files.step_dir(step, 0)) for step in (0, 1)]
    assert [table["index"].to_pylist() for table in train] == [list(range(8)), list(range(8, 16))]
    assert {*train[0]["dataset"].to_pylist(), *train[1]["dataset"].to_pylist()} == {"train"}
    assert read_table(files.eval_dir("dev", 0, 0))["dataset"].to_pylist() == ["dev"] * 5


def test_files_hold_which_version_wrote_which_tokens(make_args: Any) -> None:
    sample = Sample(
        tokens=[1, 2, 3], response_length=2, weight_versions=["3"], weight_version_spans=[span(3, 0, 2)]
    )
    table = samples_to_table([sample], step=4, attempt=0, dataset="train", rewards=[1.0])
    assert table["weight_version_spans"].to_pylist() == [[span(3, 0, 2)]]
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def test_flags(make_args: Any) -> None:
    assert not make_args().algorithm.use_tis
    assert make_args("--max-staleness", "1").algorithm.use_tis
    assert not make_args("--max-staleness", "1", "--use-rollout-logprobs").algorithm.use_tis
    with pytest.raises(UserError, match="--max-staleness -1"):
        make_args("--max-staleness", "-1")
    assert (
        make_args("--rollout-external-engine-addrs", "127.0.0.1:1").weights.update_weight_transport == "disk"
    )
    with pytest.raises(UserError, match="--colocate"):
        make_args("--max-staleness", "1", "--colocate")
