"""Rollouts of several samples: generation functions that return a list whose samples share a `rollout_id`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.engine_server import FakeEngine
from helpers.rollout import manager, run_rollout, with_engine

from rltrain.data.batch import TrainBatch
from rltrain.rollout.generate.returned import SIBLING_STRIDE
from rltrain.rollout.service.manager import as_train_output, count_rollouts
from rltrain.run.errors import UserError
from rltrain.sample import Sample
from rltrain.schema import read_metrics

CUSTOM = '''
import copy
from rltrain.sample import Sample

def finished(sample, reward=None):
    sample.append_response_tokens(tokens=[4, 5], log_probs=[-1.0, -2.0])
    sample.response, sample.status, sample.reward = "ab", Sample.Status.COMPLETED, reward
    return sample

async def agent(args, sample, sampling_params):
    """Rollout i becomes i % 3 + 1 samples, all with the reward of the rollout."""
    texts = [copy.deepcopy(sample) for _ in range(sample.index % 3 + 1)]
    return [finished(each, float(sample.index % 2)) for each in texts]

async def bare(args, sample, sampling_params):
    """Samples that hold nothing but their tokens."""
    return [finished(Sample(tokens=list(sample.tokens))) for _ in range(2)]

async def aborted(args, sample, sampling_params):
    first, second = finished(copy.deepcopy(sample)), finished(copy.deepcopy(sample))
    second.status = Sample.Status.ABORTED
    return [first, second]

async def wrong(args, sample, sampling_params):
    texts = [finished(copy.deepcopy(sample), 0.0) for _ in range(2)]
    match sample.index:
        case 0: return []
        case 1: return [texts[0], "text"]
        case 2: return [texts[0], texts[0]]
        case 3: texts[1].rollout_id = 77
        case 4: texts[1].group_index = 77
        case 5: texts[1].loss_mask = [1]
        case 6: texts[1].tokens = [1.5] * len(texts[1].tokens)
        case 7: return tuple(texts)
    return texts

async def wrong_fields(args, sample, sampling_params):
    finished(sample, 0.0)
    match sample.index:
        case 0: sample.rollout_log_probs = [float("nan"), 0.0]
        case 1: sample.rollout_log_probs = [None, None]
        case 2: sample.loss_mask = [1, 2]
        case 3: sample.response = None
        case 4: sample.status = "completed"
        case 5: sample.metadata = None
        case 6: sample.reward = float("nan")
        case 7: sample.reward = "good"
    return sample

async def reward(args, sample):
    return float(sample.label) + sample.metadata["number"]

async def group_reward(args, samples):
    return [float(len(samples))] * len(samples)

def hook(args, sample):
    sample.metadata["seen"] = True
'''


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_agents.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def flags(name: str) -> tuple[str, ...]:
    return ("--custom-generate-function-path", f"custom_agents.{name}")


def make_batch(config: Any, rollout_id: int = 0) -> Any:
    async def use(engine: FakeEngine, client: Any) -> Any:
        return await manager(config).generate(rollout_id)

    return with_engine(use, config)


def test_a_batch_counts_rollouts_and_keeps_their_samples_together(custom: None, make_args: Any) -> None:
    config = make_args(*flags("agent"), "--rollout-sample-hook-path", "custom_agents.hook")
    table = make_batch(config)
    assert table["rollout_id"].to_pylist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6, 7, 7]
    assert table["group_index"].to_pylist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    index = table["index"].to_pylist()
    assert index[:4] == [0, 1, 1 + SIBLING_STRIDE, 2] and len(set(index)) == len(index)
    # Rewards 0 and 1 of the two rollouts of each group: ±1/√2, whatever the number of samples.
    signs = [1 if each % 2 else -1 for each in table["rollout_id"].to_pylist()]
    np.testing.assert_allclose(table["train_reward"].to_pylist(), np.array(signs) / 2**0.5, atol=1e-5)
    metrics = read_metrics(table.schema)
    assert metrics["rollout/reward"] == 0.5  # of eight rollouts; of the fifteen samples it would be 8/15


def test_the_next_prompts_indices_follow_those_of_the_rollouts(custom: None, make_args: Any) -> None:
    config = make_args(*flags("agent"))
    first_try = manager(config)

    async def use(engine: FakeEngine, client: Any) -> list[Any]:
        return [await first_try.generate(i) for i in range(2)]

    first, second = with_engine(use, config)
    assert second["rollout_id"].to_pylist()[0] == 8
    again = manager(config, attempt=1)
    assert again._finished(0).select(first.column_names).equals(first)  # taken, whatever its number of rows


def test_what_a_sample_of_a_list_lacks_comes_from_the_prompts_sample(custom: None, make_args: Any) -> None:
    _, samples = run_rollout(make_args(*flags("bare"), "--custom-rm-path", "custom_agents.reward"))
    assert len(samples) == 16 and count_rollouts(samples) == 8
    pair = samples[2:4]
    assert [each.rollout_id for each in pair] == [1, 1] and [each.group_index for each in pair] == [0, 0]
    assert [(each.prompt, each.label, each.metadata) for each in pair] == [("0+0=", "0", {"number": 0})] * 2
    assert samples[8].reward == 2 + 2 + 2  # graded with the label and metadata of its prompt


def test_group_rewards_see_every_sample_of_the_group(custom: None, make_args: Any) -> None:
    config = make_args(*flags("bare"), "--group-rm", "--custom-rm-path", "custom_agents.group_reward")
    _, samples = run_rollout(config)
    assert {sample.reward for sample in samples} == {4.0}


def test_a_rollout_of_which_one_sample_was_aborted_is_not_graded(custom: None, make_args: Any) -> None:
    _, samples = run_rollout(make_args(*flags("aborted")))
    assert all(sample.reward is None for sample in samples)


def test_a_wrong_list_fails_its_rollout_and_names_function_sample_and_field(
    custom: None, make_args: Any
) -> None:
    _, samples = run_rollout(
        make_args(*flags("wrong"), "--max-failed-fraction", "1", "--rollout-batch-size", "5")
    )
    failures = [sample.failure for sample in samples if sample.failure]
    assert failures == [
        "custom_agents.wrong returned an empty list; expected one or more samples",
        "custom_agents.wrong: sample 1 of 2 is a str, not a Sample",
        "custom_agents.wrong: sample 1 of 2 is the same object as one before it: copy it",
        "custom_agents.wrong: sample 1 of 2: rollout_id is 77; expected its prompt's, 3",
        "custom_agents.wrong: sample 1 of 2: group_index is 77; expected its prompt's, 2",
        "custom_agents.wrong: sample 1 of 2: loss_mask has 1 entries for 2 response tokens",
        "custom_agents.wrong: sample 1 of 2: tokens is not a list of whole numbers ('float' object cannot be"
        " interpreted as an integer)",
        "custom_agents.wrong returned a tuple, not the sample that it was given",
    ]  # fmt: skip
    assert len(samples) == 8 + 2 * 2 and all(s.response_length == 0 for s in samples if s.failure)


def test_wrong_types_fail_their_sample_and_name_the_field(custom: None, make_args: Any) -> None:
    config = make_args(*flags("wrong_fields"), "--max-failed-fraction", "1", "--rollout-batch-size", "5")
    _, samples = run_rollout(config)
    expected = [
        "rollout_log_probs holds something that is not a finite number",
        "rollout_log_probs is not a list of numbers",
        "loss_mask holds values other than 0 and 1",
        "response is a NoneType; expected a text",
        "status is a str; expected a Sample.Status",
        "metadata is a NoneType; expected a dict",
        "the reward is nan; expected a finite number",
        "the reward is 'good'; expected a number",
    ]
    for sample, words in zip(samples, expected, strict=False):
        assert sample.failure is not None and sample.failure.startswith(
            f"custom_agents.wrong_fields: {words}"
        )
    assert [sample.failure for sample in samples[8:]] == [None, None]


def test_a_rollout_function_may_put_lists_in_the_place_of_samples() -> None:
    pair = [Sample(index=0, rollout_id=5), Sample(index=1, rollout_id=5)]
    output = as_train_output([[pair, Sample(index=2)]], "a.b", 2)
    assert output.samples == [[*pair, Sample(index=2)]]
    with pytest.raises(UserError, match=r"a.b returned 3 samples.* = 2. Samples that share"):
        as_train_output([[Sample(), Sample(), Sample()]], "a.b", 2)
    with pytest.raises(UserError, match="whose rollout_id are 5, None: give all of them the same"):
        as_train_output([[[pair[0], Sample()]]], "a.b", 1)


def make_train_batch(rollout_ids: list[int] | None) -> TrainBatch:
    count = 6
    return TrainBatch(
        tokens=[np.arange(3, dtype=np.int32)] * count,
        response_lengths=[1] * count,
        loss_masks=[np.ones(1, np.int8)] * count,
        train_rewards=np.zeros(count, np.float32),
        rollout_log_probs=None,
        rollout_ids=None if rollout_ids is None else np.array(rollout_ids),
    )


@pytest.mark.parametrize(
    ("rollout_ids", "count", "expected"),
    [
        (None, 2, [[0, 1, 2], [3, 4, 5]]),
        ([9, 9, 9, 9, 2, 3], 3, [[0, 1, 2, 3], [4], [5]]),
        ([9, 2, 9, 2, 4, 3], 2, [[0, 1, 2, 3], [4, 5]]),  # in the order in which the rollouts begin
        ([1, 1, 1, 1, 1, 1], 2, [[0, 1, 2, 3, 4, 5], []]),
    ],
)
def test_optimizer_steps_hold_whole_rollouts(rollout_ids: Any, count: int, expected: list[list[int]]) -> None:
    batch = make_train_batch(rollout_ids)
    assert [step.tolist() for step in batch.steps(count)] == expected


def test_generated_samples_survive_a_restart(custom: None, make_args: Any) -> None:
    sample = Sample(index=3, rollout_id=2, metadata={"a": 1}, queue_seconds=0.5)
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
