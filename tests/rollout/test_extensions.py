"""Contracts of the functions that users put in place of ours: what they are given, and what they may return."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fakes.engine_server import FakeEngine
from helpers.rollout import manager, run_rollout, with_engine

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import check_functions
from rltrain.data.source import RolloutDataSource
from rltrain.rollout.collect import collect
from rltrain.rollout.filters import (
    check_reward_nonzero_std,
    check_reward_nonzero_std_with_fallback,
    remove_truncated,
)
from rltrain.run.errors import UserError
from rltrain.sample import Sample
from rltrain.schema import read_metrics

GENERATE = ("--custom-generate-function-path", "custom_extensions.generate")


def batch(make_args: Any, *flags: str, rollout_id: int = 0) -> pa.Table:
    """One batch of the default rollout function, with `generate` of the custom functions."""
    config = make_args(*GENERATE, *flags)

    async def use(engine: FakeEngine, client: Any) -> pa.Table:
        return await manager(config).generate(rollout_id)

    return with_engine(use, config)


def path(name: str) -> str:
    return f"custom_extensions.{name}"


def test_dropped_groups_are_replaced_and_counted(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--dynamic-sampling-filter-path", path("every_third"),
                  "--over-sampling-batch-size", "6")  # fmt: skip
    assert table["group_index"].to_pylist() == [0, 0, 3, 3, 6, 6, 9, 9]
    metrics = read_metrics(table.schema)
    assert metrics["rollout/dynamic_filter/drop_mod_1"] >= 3
    assert 0.3 < metrics["rollout/dynamic_filter/kept_ratio"] < 0.4


def test_a_filter_may_return_a_bool(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--dynamic-sampling-filter-path", path("plain_bool"))
    assert table["group_index"].to_pylist() == [0, 0, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("name", "words"),
    [("drops_all", r"dropped 84 groups and kept 0, of the 4 .*84 × never"), ("strange_filter", "returned 'yes'")],
)  # fmt: skip
def test_a_filter_that_cannot_be_satisfied_stops_the_run(
    custom: Any, make_args: Any, name: str, words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        batch(make_args, "--dynamic-sampling-filter-path", path(name))


def test_what_is_not_needed_any_more_is_given_up_and_comes_again(custom: Any, make_args: Any) -> None:
    config = make_args(
        "--custom-generate-function-path", path("slow_second"), "--over-sampling-batch-size", "8"
    )
    source = RolloutDataSource(config.namespace)

    async def use(engine: FakeEngine, client: Any) -> Any:
        return await collect(config, 0, source)

    collected = with_engine(use, config)
    assert [group[0].group_index for group in collected.kept] == [0, 2, 4, 6]
    again = source.get_samples(4)
    assert [group[0].group_index for group in again] == [1, 3, 5, 7]
    assert all(sample.response_length == 0 and sample.reward is None for group in again for sample in group)


def test_groups_of_equal_rewards_are_dropped_by_the_built_in_filter() -> None:
    config = Config().replace(reward_key=None)
    verdict = check_reward_nonzero_std(config.namespace, [Sample(reward=1.0), Sample(reward=1.0)])
    assert (verdict.keep, verdict.reason) == (False, "zero_std_1.0")
    assert check_reward_nonzero_std(config.namespace, [Sample(reward=1.0), Sample(reward=0.0)]).keep
    assert check_reward_nonzero_std(config.namespace, [Sample(reward=1.0), Sample()]).reason == "failed"


def test_truncated_responses_can_be_left_out() -> None:
    group = [Sample(status=Sample.Status.TRUNCATED), Sample(status=Sample.Status.COMPLETED)]
    remove_truncated(argparse.Namespace(), [group])
    assert [sample.remove_sample for sample in group] == [True, False]


def test_the_buffer_filter_takes_groups_out_of_the_buffer(custom: Any, make_args: Any) -> None:
    source = RolloutDataSource(make_args("--buffer-filter-path", path("newest")).namespace)
    source.add_samples(source.get_samples(4))
    assert [group[0].group_index for group in source.get_samples(2)] == [2, 3]
    assert source.get_buffer_length() == 2
    source._args.buffer_filter_path = path("too_many")
    with pytest.raises(UserError, match="at most 1 groups"):
        source.get_samples(1)


def test_samples_can_be_left_out_of_training(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--rollout-sample-filter-path", path("remove_first"))
    assert table["loss_mask"].to_pylist() == [[0, 0], [1, 1]] * 4


def test_all_groups_are_shown_also_those_dropped(custom: Any, make_args: Any) -> None:
    batch(make_args, "--dynamic-sampling-filter-path", path("plain_bool"),
          "--rollout-all-samples-process-path", path("all_samples"))  # fmt: skip
    ((_, groups, source),) = (call for call in custom.calls if call[0] == "all")
    assert groups[:5] == [0, 1, 2, 3, 4] and isinstance(source, RolloutDataSource)


def test_hooks_see_every_sample_in_turn(custom: Any, make_args: Any) -> None:
    hooks = [flag for name in ("hook", "async_hook") for flag in ("--rollout-sample-hook-path", path(name))]
    _, samples = run_rollout(make_args(*GENERATE, *hooks))
    assert samples[1].metadata == {"number": 0, "hook": 0, "async_hook": [False, 1.0]}
    _, samples = run_rollout(make_args(*GENERATE, "--rollout-sample-hook-path", path("bad_hook")))
    assert samples[3].failure.startswith("KeyError: 'in the hook' (custom_extensions.py:")
    assert (
        samples[4].failure == "custom_extensions.bad_hook returned a dict, not the sample that it was given"
    )
    assert samples[5].failure is None


def test_finished_groups_can_be_changed(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--rollout-data-postprocess-path", path("postprocess"))
    assert table["loss_mask"].to_pylist() == [[1, 1], [0, 1]] * 4


def test_a_function_that_breaks_a_sample_is_named(custom: Any, make_args: Any) -> None:
    flag = "--rollout-data-postprocess-path"
    words = f"{flag} {path('breaks_a_mask')}: sample 2: loss_mask has 1 entries for 2 response tokens"
    with pytest.raises(UserError, match=words):
        batch(make_args, flag, path("breaks_a_mask"))


def test_another_evaluation(custom: Any, make_args: Any) -> None:
    def evaluate(name: str, rollout_id: int) -> dict[str, float]:
        config = make_args("--eval-function-path", path(name))
        return asyncio.run(manager(config).evaluate(rollout_id))

    assert evaluate("evaluate", 0)["eval/own"] == 1.0
    with pytest.raises(UserError, match="set 'own' has 2 rewards for 1 samples"):
        evaluate("evaluate", 1)
    with pytest.raises(UserError, match="evaluate_ragged: sample 0: rollout_log_probs has 2 entries for 1"):
        evaluate("evaluate_ragged", 0)


def test_rewards_can_be_processed(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--custom-reward-post-process-path", path("double"))
    assert table["reward"].to_pylist() == [0, 1] * 4 and table["train_reward"].to_pylist() == [0, 2] * 4


@pytest.mark.parametrize(
    ("name", "words"), [("one_short", "expected 8 rewards"), ("not_a_number", "sample 0: rewards is nan")]
)
def test_processed_rewards_are_checked(custom: Any, make_args: Any, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"custom_extensions.{name}.*{words}"):
        batch(make_args, "--custom-reward-post-process-path", path(name))


def test_the_train_data_can_be_made_otherwise(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--custom-convert-samples-to-train-data-path", path("first_three"))
    assert table["train_reward"].to_pylist() == [7, 8, 9] and table["reward"].to_pylist() == [1, 2, 3]
    assert table["loss_mask"].to_pylist() == [[1, 0]] * 3
    assert table["group_index"].to_pylist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ragged", "sample 1: loss_masks has 1 entries for 2 response tokens"),
        ("lacks_rewards", "no 'rewards'"),
    ],
)
def test_train_data_that_is_ragged_is_named(custom: Any, make_args: Any, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"custom_extensions.{name}: .*{words}"):
        batch(make_args, "--custom-convert-samples-to-train-data-path", path(name))


def test_metrics_can_be_added_or_replaced(custom: Any, make_args: Any) -> None:
    flags = ("--custom-rollout-log-function-path", path("log"))
    added = read_metrics(batch(make_args, *flags).schema)
    assert added["rollout/mine"] == 8 and "rollout/reward" in added
    replaced = read_metrics(batch(make_args, *flags, rollout_id=1).schema)
    assert replaced["rollout/mine"] == 8 and "rollout/reward" not in replaced


def test_metrics_of_evaluations_too(custom: Any, make_args: Any, prompt_file: Path) -> None:
    config = make_args(*GENERATE, "--custom-eval-rollout-log-function-path", path("eval_log"),
                     "--eval-prompt-data", "dev", f"{prompt_file}@[:3]")  # fmt: skip

    async def use(engine: FakeEngine, client: Any) -> Any:
        return [await manager(config).evaluate(i) for i in range(2)]

    added, replaced = with_engine(use, config)
    assert added["eval/mine"] == 3 and added["eval/dev"] == pytest.approx(1 / 3)
    assert replaced == {"eval/mine": 3}


def test_a_filter_may_fill_up_a_batch_from_one_wave(custom: Any, make_args: Any) -> None:
    """Of 8 groups 3 are wanted: the best, and one of the others, without another wave."""
    table = batch(make_args, "--dynamic-sampling-filter-path", path("falls_back"),
                  "--over-sampling-batch-size", "8")  # fmt: skip
    groups = set(table["group_index"].to_pylist())
    assert len(groups) == 4 and {0, 3, 6} <= groups and len(custom.calls) == 8
    metrics = read_metrics(table.schema)
    assert metrics["rollout/dynamic_filter/drop_other"] == 4
    all_dropped = check_reward_nonzero_std_with_fallback(
        argparse.Namespace(reward_key=None), [Sample(reward=1.0), Sample(reward=1.0)]
    )
    assert (all_dropped.keep, all_dropped.keep_when_insufficient) == (False, True)


def test_a_verdict_may_be_a_tensor_as_slimes_filters_return_it(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--dynamic-sampling-filter-path", path("tensor_bool"))
    assert set(table["group_index"].to_pylist()) == {0, 2, 3, 4}


def test_post_processing_with_three_arguments_is_left_to_the_trainer(custom: Any, make_args: Any) -> None:
    flags = ("--rollout-data-postprocess-path", path("in_the_trainer"))
    check_functions(make_args(*flags).functions)
    assert batch(make_args, *flags).num_rows == 8


def test_another_data_source(custom: Any, make_args: Any) -> None:
    table = batch(make_args, "--data-source-path", path("Reversed"), "--over-sampling-batch-size", "4")
    assert set(table["group_index"].to_pylist()) == {0, 1, 2, 3}


@pytest.mark.slow
def test_samples_of_a_prompt_can_be_graded_together(custom: Any, make_args: Any) -> None:
    _, samples = run_rollout(make_args("--group-rm", "--custom-rm-path", path("group_reward")))
    assert [sample.reward for sample in samples] == [0, 1] * 4
    with pytest.raises(RuntimeError, match=r"all 8 samples failed.*a list of 2, one per sample"):
        run_rollout(make_args("--group-rm", "--custom-rm-path", path("bad_group_reward")))


def test_too_many_failures_stop_the_run(make_args: Any) -> None:
    run_rollout(make_args(), faults=[400] * 4)
    with pytest.raises(
        RuntimeError, match=r"5 of 8 samples failed, more than --max-failed-fraction 0.5.*5 × "
    ):
        run_rollout(make_args(), faults=[400] * 5)


def test_prompts_may_bring_their_own_sampling_parameters(make_args: Any, tmp_path: Path) -> None:
    row = {
        "input": "1+1=",
        "label": "2",
        "metadata": {"sampling_params": {"temperature": 0.25, "max_new_tokens": 3, "sampling_seed": 5}},
    }
    (tmp_path / "wishes.jsonl").write_text((json.dumps(row) + "\n") * 4)
    config = make_args(
        "--prompt-data", str(tmp_path / "wishes.jsonl"), "--sglang-enable-deterministic-inference"
    )
    source = RolloutDataSource(config.namespace)

    async def use(engine: FakeEngine, client: Any) -> list[dict[str, Any]]:
        await collect(config, 0, source)
        return [request["sampling_params"] for request in engine.requests]

    names = ("temperature", "max_new_tokens", "sampling_seed", "top_p")
    assert {tuple(each[name] for name in names) for each in with_engine(use, config)} == {(0.25, 3, 5, 1.0)}
    source.add_samples([[Sample(index=9, tokens=[5], metadata={"sampling_params": "greedy"})]])
    config = config.replace(rollout_batch_size=1, over_sampling_batch_size=1)

    async def failure(engine: FakeEngine, client: Any) -> Any:
        return (await collect(config, 0, source)).kept[0][0].failure

    assert with_engine(failure, config) == "metadata sampling_params is 'greedy'; expected a dict"


def test_a_batch_larger_than_the_data_is_refused(make_args: Any) -> None:
    from rltrain.inputs import check_inputs

    config = make_args("--rollout-batch-size", "21", "--random-init")
    with pytest.raises(UserError, match=r"an epoch has 20 prompts, fewer than --rollout-batch-size 21"):
        check_inputs(config)


def test_cancelling_is_not_a_failure(custom: Any, make_args: Any) -> None:
    """A rollout that is cancelled ends its tasks and gives the groups back."""
    config = make_args("--custom-generate-function-path", path("slow_second"), "--rollout-batch-size", "2")
    source = RolloutDataSource(config.namespace)

    async def use(engine: FakeEngine, client: Any) -> int:
        task = asyncio.ensure_future(collect(config, 0, source))
        await asyncio.wait([task], timeout=0.2)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        return len(
            [
                each
                for each in asyncio.all_tasks()
                if "collect" in repr(each) or "GroupRunner.fill" in repr(each)
            ]
        )

    assert with_engine(use, config) == 0
