"""Half of a job: flags, files and plans of rollouts without a trainer, and of a trainer on recorded rollouts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.rollout import manager, with_engine

from hpc.planning.job_plan import make_plan
from rltrain.inputs import check_inputs
from rltrain.rollout.service.manager import RolloutManager
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, table_to_samples


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--save-debug-rollout-data /tmp/all.parquet",
            "without {rollout_id} in it every rollout would replace",
        ),
        ("--save-debug-rollout-data /tmp/{rollout_id}.pkl", "End the name in .parquet"),
        ("--save-debug-rollout-data /tmp/{step}.parquet", "only {rollout_id} may stand in braces"),
        ("--load-debug-rollout-data /tmp/{rollout_id:x}{.parquet", "only {rollout_id} may stand in braces"),
        ("--load-debug-rollout-data-subsample 0.5", "greater than 0 and at most 1, and it needs --load"),
        (
            "--load-debug-rollout-data /tmp/{rollout_id}.parquet --load-debug-rollout-data-subsample 2",
            "at most 1",
        ),
        ("--debug-rollout-only --load-debug-rollout-data /tmp/{rollout_id}.parquet", "leave one of them out"),
        ("--debug-rollout-only --random-init", "--random-init has none"),
    ],
)
def test_flags_that_cannot_be_right_are_refused(make_args: Any, flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("{", r"\{").replace("}", r"\}")):
        make_args(*flags.split())


def test_without_a_trainer_something_light_asks_for_the_batches(make_args: Any) -> None:
    plan = make_plan(make_args("--debug-rollout-only", "--actor-num-gpus-per-node", "2"), python="py")
    assert {process.role: process.argv[2] for process in plan.processes} == {
        "router": "rltrain.sglang.router", "engine": "rltrain.sglang.engine", "rollout": "rltrain.rollout",
        "trainer": "rltrain.rollout_only",
    }  # fmt: skip
    assert len(plan.processes) == 4


def test_without_engines_there_is_neither_router_nor_prompt_file(make_args: Any, tmp_path: Path) -> None:
    config = make_args("--load-debug-rollout-data", str(tmp_path / "{rollout_id}.parquet"))
    assert [process.role for process in make_plan(config).processes] == ["rollout", "trainer"]


def generate(config: Any, rollout_id: int, attempt: int = 0) -> Any:
    async def use(engine: Any, client: Any) -> Any:
        return await manager(config, attempt).generate(rollout_id)

    return with_engine(use, config)


def test_what_was_saved_can_be_trained_on_otherwise(make_args: Any, tmp_path: Path) -> None:
    template = str(tmp_path / "saved" / "{rollout_id:03d}.parquet")
    custom = tmp_path / "graded.py"
    custom.write_text("async def reward(args, sample):\n    return float(sample.index)\n")
    flags = ("--custom-rm-path", "graded.reward", "--rm-type", "exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.setenv("PYTHONPATH", str(tmp_path))
        saved = generate(make_args(*flags, "--save-debug-rollout-data", template), 2)
    stored = pq.read_table(tmp_path / "saved" / "002.parquet")
    assert stored.select(saved.column_names).equals(saved)

    loading = ("--load-debug-rollout-data", template, "--disable-grpo-std-normalization")
    config = make_args(*loading)
    other = RolloutManager(config, RunLayout(tmp_path / "other"), 0)
    loaded = asyncio.run(other.generate(2))
    same = [
        "tokens",
        "loss_mask",
        "rollout_log_probs",
        "reward",
        "group_index",
        "index",
        "rollout_id",
        "status",
    ]
    assert loaded.select(same).equals(saved.select(same))
    assert loaded["train_reward"].to_pylist() == [-0.5, 0.5] * 4  # of the flags now; saved were ± 1/√2

    half = make_args(*loading, "--load-debug-rollout-data-subsample", "0.5")
    assert asyncio.run(RolloutManager(half, RunLayout(tmp_path / "half"), 0).generate(2)).num_rows == 4
    with pytest.raises(UserError, match=r"001.parquet holds no recorded rollout"):
        asyncio.run(other.generate(1))
    config = config.replace(random_init=True)  # the tokenizer's directory has no weights
    with pytest.raises(UserError, match=r"there is no .*000.parquet, for rollout 0 of --num-rollout 3"):
        check_inputs(config)


def test_samples_come_back_from_their_table() -> None:
    samples = [
        Sample(group_index=0, index=0, rollout_id=0, prompt="1+1=", tokens=[4, 5, 6], response="2", response_length=1,
               label="2", reward=1.0, loss_mask=[1], rollout_log_probs=[-0.5], status=Sample.Status.COMPLETED,
               metadata={"a": [1]}, weight_versions=["3"], queue_seconds=0.5, generate_seconds=1.0,
               prefill_seconds=0.25, decode_seconds=0.125, non_generation_time=2.0, reward_seconds=4.0),
        Sample(group_index=0, index=1, rollout_id=7, prompt=[{"role": "user", "content": "hi"}], tokens=[4],
               reward={"score": 0.5, "pred": "x"}, loss_mask=[], status=Sample.Status.FAILED, failure="why"),
    ]  # fmt: skip
    table = samples_to_table(samples, step=0, attempt=0, dataset="train", rewards=[1.0, 0.5])
    assert table_to_samples(table) == samples
    older = table.drop_columns(
        ["rollout_id", "queue_seconds", "prefill_seconds", "decode_seconds", "tool_seconds"]
    )
    assert [sample.rollout_id for sample in table_to_samples(older)] == [None, None]
