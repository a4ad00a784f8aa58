"""`RolloutManager`: one step after another, from prompts to the finished batch on disk."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rltrain.arguments.config import Config
from rltrain.functions import load_function, takes
from rltrain.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
from rltrain.rollout.collect import abort_lock
from rltrain.rollout.generate.look_ahead import OneTake, takes_all_at_once
from rltrain.rollout.generate.staleness import age_metrics, largest_age
from rltrain.rollout.train_data.convert import TrainData, check_samples, to_train_data
from rltrain.rollout.train_data.metrics import batch_metrics, category_metrics, correct_metrics, eval_metrics
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.run.plain import plain_metrics
from rltrain.sample import Sample, age
from rltrain.schema import ROUTES, TRAIN_COLUMNS, read_table, samples_to_table, write_file, write_table


class RolloutManager:
    """Runs the rollout function, and turns what it returns into a batch."""

    def __init__(self, config: Config, layout: RunLayout, attempt: int) -> None:
        """Read the prompts and load the functions.

        Raises:
            UserError: the prompts or a function are wrong.
        """
        self._config, self._layout, self._attempt = config, layout, attempt
        self.max_staleness, self.num_rollout = config.rollout.max_staleness, config.rollout.num_rollout or 0
        self._batch_size = config.rollout.rollout_batch_size * config.rollout.n_samples_per_prompt
        self._rollout = load_function(config.functions.rollout_function_path, flag="--rollout-function-path")
        self._evaluate = self._rollout
        if config.functions.eval_function_path:
            self._evaluate = load_function(config.functions.eval_function_path, flag="--eval-function-path")
        self._data_source = load_function(config.functions.data_source_path, flag="--data-source-path")(
            config.namespace
        )
        too_long = getattr(self._data_source, "num_prompts_too_long", 0)
        if too_long:
            print(f"{too_long} prompts are too long and left out", flush=True)

    def load(self, rollout_id: int) -> None:
        """Put the data source where it stood before rollout `rollout_id`."""
        self._data_source.load(rollout_id - 1)

    async def generate(self, rollout_id: int, taken: asyncio.Event | None = None) -> pa.Table:
        """The batch of a step; it is on disk when this returns.

        Its columns are `TRAIN_COLUMNS`, and `ROUTES` where there are any; its metadata has the metrics.

        A batch that an earlier try of this step finished is reused. `taken` is set as soon as the next step can take
        its prompts, if that is before this returns.
        """
        table = self._finished(rollout_id)
        if table is None:
            table = await self._generate(rollout_id, taken)
        return table.select([name for name in (*TRAIN_COLUMNS, ROUTES) if name in table.column_names])

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate the engines' weights; the samples are on disk when this returns."""
        config = self._config
        async with abort_lock():
            result = await _call(
                self._evaluate, config.namespace, rollout_id, self._data_source, evaluation=True
            )
        output = as_eval_output(result, self._eval_path)
        metrics = dict(output.metrics or {})
        path = config.functions.custom_eval_rollout_log_function_path
        log = load_function(path, flag="--custom-eval-rollout-log-function-path") if path else None
        ours = not (log and log(rollout_id, config.namespace, output.data, metrics))
        for name, result in output.data.items():
            samples, rewards = result["samples"], result["rewards"]
            check_samples(config.functions, config.rewards, samples, ("--eval-function-path",))
            own = eval_metrics(name, samples, rewards)
            table = samples_to_table(
                samples, step=rollout_id, attempt=self._attempt, dataset=name, rewards=rewards, metrics=own
            )
            await asyncio.to_thread(
                write_table, table, self._layout.eval_dir(name, rollout_id, self._attempt)
            )
            metrics |= own if ours else {}
        return plain_metrics(metrics, self._eval_path, _complain)

    @property
    def _eval_path(self) -> str:
        functions = self._config.functions
        return functions.eval_function_path or functions.rollout_function_path

    def _finished(self, rollout_id: int) -> pa.Table | None:
        """The batch of this step if an earlier try finished it; the data source then moves on past it."""
        directory = self._layout.find_step(rollout_id)
        if directory is None:
            return None
        table = read_table(directory)
        rollouts = _rollouts_in(table)
        if (
            rollouts != self._batch_size
            and not self._config.functions.custom_convert_samples_to_train_data_path
        ):
            print(
                f"rollout {rollout_id}: {directory} has another batch size and is generated again", flush=True
            )
            return None
        ages = [age(rollout_id, versions or []) for versions in table["weight_versions"].to_pylist()]
        oldest = max((each for each in ages if each is not None), default=0.0)
        if oldest > largest_age(self._config.rollout, self._config.weights):
            print(
                f"rollout {rollout_id}: {directory} has samples {oldest:g} versions old, more than --max-staleness"
                " allows, and is generated again", flush=True,
            )  # fmt: skip
            return None
        self._data_source.load(rollout_id)
        print(f"rollout {rollout_id}: taken from {directory}", flush=True)
        return table

    async def _generate(self, rollout_id: int, taken: asyncio.Event | None) -> pa.Table:
        began = time.perf_counter()
        config, source = self._config, self._data_source
        at_once = taken is not None and takes_all_at_once(config.functions, config.rollout)
        if taken is not None and at_once:
            source = OneTake(source, self._config.rollout.rollout_batch_size, rollout_id, taken)
        output = as_train_output(
            await _call(self._rollout, self._config.namespace, rollout_id, source, evaluation=False),
            self._config.functions.rollout_function_path,
            None if self._config.debug.load_debug_rollout_data else self._batch_size,
        )
        table = self._to_table(rollout_id, output.samples, output.metrics or {}, time.perf_counter() - began)
        if not at_once:
            # The state first: once the batch is there, the step is never generated again.
            self._data_source.save(rollout_id)
        await asyncio.to_thread(write_table, table, self._layout.step_dir(rollout_id, self._attempt))
        if self._config.debug.save_debug_rollout_data:
            path = Path(self._config.debug.save_debug_rollout_data.format(rollout_id=rollout_id))
            await asyncio.to_thread(write_file, table, path)
        return table

    def _to_table(
        self, rollout_id: int, groups: list[list[Sample]], extra: dict[str, float], seconds: float
    ) -> pa.Table:
        config = self._config
        if path := config.functions.rollout_data_postprocess_path:
            change = load_function(path, flag="--rollout-data-postprocess-path")
            if takes(change, 2):  # one with three arguments is the trainer's
                change(config.namespace, groups)
        data = to_train_data(config, [sample for group in groups for sample in group])
        metrics = self._metrics(rollout_id, data, extra, seconds)
        print(_line(rollout_id, len(data.samples), metrics, seconds), flush=True)
        return samples_to_table(
            data.samples,
            step=rollout_id,
            attempt=self._attempt,
            dataset="train",
            rewards=data.rewards,
            train_rewards=data.train_rewards,
            metrics=metrics,
        )

    def _metrics(
        self, rollout_id: int, data: TrainData, extra: dict[str, float], seconds: float
    ) -> dict[str, float]:
        """The function's own metrics, and ours unless --custom-rollout-log-function-path says not to."""
        path, extra = self._config.functions.custom_rollout_log_function_path, dict(extra)
        metrics = batch_metrics(data.samples, data.rewards) | age_metrics(rollout_id, data.samples)
        if self._config.algorithm.loss_type != "sft_loss":  # that only reads the data
            metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / extra.get("perf/generate_s", seconds)
        if key := self._config.tracking.log_reward_category:
            metrics |= category_metrics(key, data.samples)
        if self._config.tracking.log_correct_samples:
            metrics |= correct_metrics(data.samples, data.rewards)
        if path:
            log = load_function(path, flag="--custom-rollout-log-function-path")
            if log(rollout_id, self._config.namespace, data.samples, extra, seconds):
                metrics = {}
        own = plain_metrics(extra, path or self._config.functions.rollout_function_path, _complain)
        return metrics | {name if "/" in name else f"rollout/{name}": value for name, value in own.items()}


def _rollouts_in(table: pa.Table) -> int:
    """Rollouts in a batch; where files of older versions do not say, every sample is one."""
    column = table["rollout_id"] if "rollout_id" in table.column_names else None
    return table.num_rows if column is None or column.null_count else len(column.unique())


async def _call(function: Callable[..., Any], *args: Any, evaluation: bool) -> Any:
    """Call a rollout function; one that is not a coroutine function gets a thread, so that we can still answer."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, evaluation=evaluation)
    return await asyncio.to_thread(function, *args, evaluation=evaluation)


def _complain(message: str) -> None:
    print(f"warning: {message}", flush=True)


def _line(rollout_id: int, count: int, metrics: dict[str, float], seconds: float) -> str:
    reward, length = metrics.get("rollout/reward"), metrics.get("rollout/response_length")
    return (
        f"rollout {rollout_id}: {count} samples in {seconds:.1f} s"
        + (f", {length:.1f} tokens each" if length is not None else "")
        + (f", reward {reward:.3f}" if reward is not None else "")
    )


def as_train_output(output: Any, path: str, count: int | None) -> RolloutFnTrainOutput:
    """Check what the rollout function at `path` returned; its groups are flat in the result.

    Raises:
        UserError: it is not a batch of `count` rollouts (None: of any number) in groups.
    """
    if not isinstance(output, RolloutFnTrainOutput):
        output = RolloutFnTrainOutput(output)
    groups = output.samples
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise UserError(
            f"{path} returned {_kind(groups)}; expected a list of groups, each a list of samples."
        )
    flat = [[sample for each in group for sample in _siblings(each, path)] for group in groups]
    found = count_rollouts([sample for group in flat for sample in group])
    if count is not None and found != count:
        raise UserError(
            f"{path} returned {found} samples; expected --rollout-batch-size × --n-samples-per-prompt ="
            f" {count}. Samples that share a rollout_id count as one."
        )
    return RolloutFnTrainOutput(flat, output.metrics)


def count_rollouts(samples: Sequence[Sample]) -> int:
    """Number of rollouts that these samples come from: samples that share a `rollout_id` come from one."""
    siblings = [sample.rollout_id for sample in samples if sample.rollout_id is not None]
    return len(samples) - len(siblings) + len(set(siblings))


def _siblings(each: Any, path: str) -> list[Sample]:
    """The sample, or the samples in its place."""
    samples = each if isinstance(each, list) else [each]
    stranger = next((sample for sample in samples if not isinstance(sample, Sample)), None)
    if stranger is not None:
        raise UserError(f"{path} returned a group that holds {_kind(stranger)}; expected a Sample.")
    ids = {sample.rollout_id for sample in samples}
    if isinstance(each, list) and (len(ids) != 1 or None in ids):
        raise UserError(
            f"{path} returned, in place of one sample, a list whose rollout_id are"
            f" {', '.join(str(sample.rollout_id) for sample in samples)}: give all of them the same."
        )
    return samples


def as_eval_output(output: Any, path: str) -> RolloutFnEvalOutput:
    """Check what the evaluation function at `path` returned.

    Raises:
        UserError: it is not a dict of sets, or a set lacks rewards or samples, or their numbers differ.
    """
    if not isinstance(output, RolloutFnEvalOutput):
        output = RolloutFnEvalOutput(output)
    if not isinstance(output.data, dict):
        raise UserError(f"{path} returned {_kind(output.data)}; expected a dict of evaluation sets.")
    for name, result in output.data.items():
        if not isinstance(result, dict) or not {"rewards", "samples"} <= result.keys():
            raise UserError(f"{path}: set {name!r} is {_kind(result)} without 'rewards' and 'samples'.")
        rewards, samples = result["rewards"], result["samples"]
        if len(rewards) != len(samples):
            raise UserError(f"{path}: set {name!r} has {len(rewards)} rewards for {len(samples)} samples.")
    return output


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
