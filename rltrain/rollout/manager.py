"""`RolloutManager`: one step after another, from prompts to the finished batch on disk."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from hpc.layout import RunLayout
from rltrain.data.source import RolloutDataSource
from rltrain.functions import load_function
from rltrain.rollout.base_types import as_eval_output, as_train_output
from rltrain.rollout.metrics import batch_metrics, eval_metrics
from rltrain.rollout.normalize import train_rewards
from rltrain.rollout.parquet import read_table, write_table
from rltrain.sample import Sample
from rltrain.schema import TRAIN_COLUMNS, samples_to_table

_UNUSABLE = (Sample.Status.FAILED, Sample.Status.ABORTED)


class RolloutManager:
    """Runs the rollout function, and turns what it returns into a batch."""

    def __init__(self, args: argparse.Namespace, layout: RunLayout, attempt: int) -> None:
        """Read the prompts and load the functions.

        Raises:
            UserError: one of them is not as it should be.
        """
        self._args, self._layout, self._attempt = args, layout, attempt
        self._batch_size = args.rollout_batch_size * args.n_samples_per_prompt
        self._rollout = load_function(args.rollout_function_path, flag="--rollout-function-path")
        self._evaluate = self._rollout
        if args.eval_function_path:
            self._evaluate = load_function(args.eval_function_path, flag="--eval-function-path")
        self._data_source = RolloutDataSource(args)
        if self._data_source.num_prompts_too_long:
            print(f"{self._data_source.num_prompts_too_long} prompts are too long and left out", flush=True)

    def load(self, rollout_id: int) -> None:
        """Put the data source where it stood before rollout `rollout_id`."""
        self._data_source.load(rollout_id - 1)

    async def generate(self, rollout_id: int) -> pa.Table:
        """The batch of a step (`TRAIN_COLUMNS`, with metrics); it is on disk when this returns.

        A batch that an earlier try of this step finished is taken as it is.
        """
        table = self._finished(rollout_id)
        if table is None:
            table = await self._generate(rollout_id)
        return table.select(TRAIN_COLUMNS)

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate the engines' weights; the samples are on disk when this returns."""
        args = self._args
        output = as_eval_output(
            await _call(self._evaluate, args, rollout_id, self._data_source, evaluation=True),
            args.eval_function_path or args.rollout_function_path,
        )
        metrics = dict(output.metrics or {})
        for name, result in output.data.items():
            samples, rewards = result["samples"], result["rewards"]
            own = eval_metrics(name, samples, rewards)
            table = samples_to_table(
                samples, step=rollout_id, attempt=self._attempt, dataset=name, rewards=rewards, metrics=own
            )
            write_table(table, self._layout.eval_dir(name, rollout_id, self._attempt))
            metrics |= own
        return metrics

    def _finished(self, rollout_id: int) -> pa.Table | None:
        """The batch of this step if an earlier try finished it; the data source then moves on past it."""
        directory = self._layout.find_step(rollout_id)
        if directory is None:
            return None
        table = read_table(directory)
        if table.num_rows != self._batch_size:
            print(
                f"rollout {rollout_id}: {directory} has another batch size and is generated anew", flush=True
            )
            return None
        self._data_source.load(rollout_id)
        print(f"rollout {rollout_id}: taken from {directory}", flush=True)
        return table

    async def _generate(self, rollout_id: int) -> pa.Table:
        began = time.perf_counter()
        output = as_train_output(
            await _call(self._rollout, self._args, rollout_id, self._data_source, evaluation=False),
            self._args.rollout_function_path,
            self._batch_size,
        )
        samples = [sample for group in output.samples for sample in group]
        table = self._to_table(rollout_id, samples, output.metrics or {}, time.perf_counter() - began)
        # The state first: once the batch is there, the step is never generated again.
        self._data_source.save(rollout_id)
        await asyncio.to_thread(write_table, table, self._layout.step_dir(rollout_id, self._attempt))
        return table

    def _to_table(
        self, rollout_id: int, samples: list[Sample], extra: dict[str, float], seconds: float
    ) -> pa.Table:
        args = self._args
        for sample in samples:
            if sample.status in _UNUSABLE or sample.remove_sample:
                sample.loss_mask = [0] * sample.response_length
        rewards = [
            None if sample.status in _UNUSABLE or sample.reward is None else sample.get_reward_value(args)
            for sample in samples
        ]
        metrics = batch_metrics(samples, rewards)
        metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / extra.get("perf/generate_s", seconds)
        metrics |= {name if "/" in name else f"rollout/{name}": value for name, value in extra.items()}
        print(_line(rollout_id, len(samples), metrics, seconds), flush=True)
        return samples_to_table(
            samples,
            step=rollout_id,
            attempt=self._attempt,
            dataset="train",
            rewards=rewards,
            train_rewards=self._train_rewards(samples, rewards),
            metrics=metrics,
        )

    def _train_rewards(self, samples: list[Sample], rewards: list[float | None]) -> list[float]:
        return train_rewards(self._args, [sample.group_index for sample in samples], rewards)


async def _call(function: Callable[..., Any], *args: Any, evaluation: bool) -> Any:
    """Call a rollout function; one that is not a coroutine function gets a thread, so that we can still answer."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, evaluation=evaluation)
    return await asyncio.to_thread(function, *args, evaluation=evaluation)


def _line(rollout_id: int, count: int, metrics: dict[str, float], seconds: float) -> str:
    reward = metrics.get("rollout/reward")
    return (
        f"rollout {rollout_id}: {count} samples in {seconds:.1f} s,"
        f" {metrics['rollout/response_length']:.1f} tokens each"
        + (f", reward {reward:.3f}" if reward is not None else "")
    )
