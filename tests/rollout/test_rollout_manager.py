"""From a rollout function's samples to the batch: masks, normalised rewards, files, restarts, the HTTP server."""

from __future__ import annotations

import asyncio
import itertools
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from aiohttp import web
from conftest import TOKEN
from helpers.rollout import layout, manager

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.rollout.service.client import RolloutClient, RolloutError
from rltrain.rollout.service.manager import RolloutManager
from rltrain.rollout.service.server import make_app
from rltrain.rollout.train_data.metrics import reward_latency
from rltrain.run.errors import UserError
from rltrain.sample import Sample
from rltrain.schema import SCHEMA, TRAIN_COLUMNS, read_metrics, read_table, write_table

CUSTOM = """
import asyncio
from rltrain.sample import Sample

calls = []

def fill(sample, reward, status="COMPLETED"):
    sample.append_response_tokens(tokens=[4, 5, 6], log_probs=[-1.0, -2.0, -3.0])
    sample.response, sample.reward = "abc", reward
    sample.status = Sample.Status[status]

def generate_rollout(args, rollout_id, data_source, evaluation=False):
    calls.append((rollout_id, evaluation))
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            fill(sample, float(sample.index % 3))
    if evaluation:
        samples = [sample for group in groups for sample in group]
        return {"dev": {"rewards": [sample.reward for sample in samples], "samples": samples}}
    groups[0][1].status, groups[0][1].failure, groups[0][1].reward = Sample.Status.FAILED, "made up", None
    groups[1][0].remove_sample = True
    groups[2][0].status = groups[2][1].status = Sample.Status.TRUNCATED
    groups[2][1].reward = groups[2][0].reward
    return groups

async def slow(args, rollout_id, data_source, evaluation=False):
    await asyncio.sleep(0.2)
    return generate_rollout(args, rollout_id, data_source, evaluation)

def too_few(args, rollout_id, data_source, evaluation=False):
    return generate_rollout(args, rollout_id, data_source)[1:]

def strange(args, rollout_id, data_source, evaluation=False):
    return [[1]] if not evaluation else {"dev": {"rewards": []}}

def fails(args, rollout_id, data_source, evaluation=False):
    raise ZeroDivisionError("in the rollout function")
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "custom_batches.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    import custom_batches

    return importlib.reload(custom_batches)


def batch_args(make_args, *flags: str, function: str = "generate_rollout") -> Config:
    return make_args("--rollout-function-path", f"custom_batches.{function}", *flags)


def generate(manager: RolloutManager, rollout_id: int) -> pa.Table:
    return asyncio.run(manager.generate(rollout_id))


def test_a_batch_is_masked_normalised_and_on_disk(custom, make_args) -> None:
    config = batch_args(make_args)
    table = generate(manager(config), 0)
    assert table.column_names == TRAIN_COLUMNS and table.num_rows == 8
    batch = TrainBatch.from_arrow(table)
    assert [mask.tolist() for mask in batch.loss_masks[:4]] == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    # Rewards 0 (failed), 2 0, equal, 0 1: the failed one is left out, so its group is one of one.
    expected = [0, 0, 2**-0.5, -(2**-0.5), 0, 0, -(2**-0.5), 2**-0.5]
    np.testing.assert_allclose(batch.train_rewards, expected, atol=1e-5)

    path = layout(config).step_dir(0, 0) / "part-0.parquet"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    stored = read_table(path.parent)
    assert stored.schema.names == SCHEMA.names
    assert stored.select(TRAIN_COLUMNS).equals(table)
    row = stored.slice(1, 1).to_pylist()[0]
    assert (row["status"], row["failure"], row["reward"]) == ("failed", "made up", None)
    assert (row["prompt"], row["label"], row["response"], row["dataset"]) == ("0+0=", "0", "abc", "train")
    assert json.loads(row["metadata"]) == {"number": 0}


def test_metrics_of_a_batch(custom, make_args) -> None:
    metrics = read_metrics(generate(manager(batch_args(make_args)), 0).schema)
    assert metrics["rollout/reward"] == pytest.approx((0 + 2 + 0 + 1 + 1 + 0 + 1) / 7)
    assert metrics["rollout/failed_ratio"] == 1 / 8
    assert metrics["rollout/truncated_ratio"] == 2 / 8
    assert metrics["rollout/zero_std_ratio"] == 1 / 3  # of the three groups with two graded samples
    assert (metrics["rollout/response_length"], metrics["rollout/tokens"]) == (3.0, 24.0)


def test_reward_latency_leaves_samples_out_that_were_not_graded() -> None:
    samples = [Sample(reward_seconds=float(seconds)) for seconds in range(201)]
    metrics = reward_latency(samples)  # 200 of them took 1 to 200 seconds
    assert metrics == {"perf/reward_latency_mean": 100.5, "perf/reward_latency_p99": 199.0}
    assert reward_latency(samples[:1]) == {}


def test_without_normalisation_the_rewards_are_trained_on_as_they_are(custom, make_args) -> None:
    table = generate(manager(batch_args(make_args, "--disable-rewards-normalization")), 0)
    assert table["train_reward"].to_pylist() == [0, 0, 2, 0, 1, 1, 0, 1]


def test_dr_grpo_only_takes_the_mean_off(custom, make_args) -> None:
    table = generate(manager(batch_args(make_args, "--disable-grpo-std-normalization")), 0)
    assert table["train_reward"].to_pylist() == [0, 0, 1, -1, 0, 0, -0.5, 0.5]


def test_a_finished_step_is_taken_from_disk_and_the_data_goes_on_after_it(custom, make_args) -> None:
    config = batch_args(make_args)
    first = manager(config)
    tables = [generate(first, step) for step in range(3)]
    restarted = manager(config, attempt=1)
    restarted.load(1)
    assert generate(restarted, 1).equals(tables[1])
    assert generate(restarted, 2).equals(tables[2])
    assert custom.calls == [(0, False), (1, False), (2, False)]
    new, unbroken = generate(restarted, 3), generate(first, 3)
    assert new["index"].to_pylist() == list(range(24, 32))
    assert new.equals(unbroken)
    assert layout(config).find_step(3) == layout(config).step_dir(3, 1)


def test_a_half_written_step_is_generated_anew(custom, make_args) -> None:
    config = batch_args(make_args)
    directory = layout(config).step_dir(0, 0)
    directory.mkdir(parents=True)
    (directory / ".part-0.parquet.tmp").write_bytes(b"PAR1 cut off")
    restarted = manager(config, attempt=1)
    restarted.load(0)
    assert generate(restarted, 0).num_rows == 8
    assert custom.calls == [(0, False)]


def test_a_step_of_another_batch_size_is_generated_anew(custom, make_args) -> None:
    generate(manager(batch_args(make_args)), 0)
    config = batch_args(make_args, "--n-samples-per-prompt", "3")
    assert generate(manager(config, attempt=1), 0).num_rows == 12


def test_evaluation_writes_its_samples_and_averages(custom, make_args) -> None:
    config = batch_args(make_args)
    metrics = asyncio.run(manager(config, attempt=2).evaluate(5))
    assert metrics["eval/dev"] == pytest.approx((0 + 1 + 2 + 0 + 1 + 2 + 0 + 1) / 8)
    assert metrics["eval/dev/response_length"] == 3
    table = read_table(layout(config).eval_dir("dev", 5, 2))
    assert set(table["dataset"].to_pylist()) == {"dev"} and set(table["step"].to_pylist()) == {5}


@pytest.mark.parametrize(
    ("function", "words"),
    [("too_few", "returned 6 samples; .* 8\\. "), ("strange", "a int; expected a Sample")],
)
def test_a_rollout_function_that_returns_something_else_is_named(custom, make_args, function, words) -> None:
    with pytest.raises(
        UserError, match=f"custom_batches.{function} returned .*{words.split('returned ')[-1]}"
    ):
        generate(manager(batch_args(make_args, function=function)), 0)


def test_an_evaluation_without_samples_is_named(custom, make_args) -> None:
    with pytest.raises(UserError, match="set 'dev'"):
        asyncio.run(manager(batch_args(make_args, function="strange")).evaluate(0))


def test_fine_tuning_takes_labels_for_responses(make_args) -> None:
    config = make_args("--rollout-function-path", "rltrain.rollout.sft_rollout.generate_rollout")
    table = generate(manager(config), 0)
    batch = TrainBatch.from_arrow(table)
    assert batch.tokens[2].tolist() == [4, 13, 4, 16, 5, 1]  # "1+1=" "2" <eos>
    assert batch.response_lengths[2] == 2 and batch.loss_masks[2].tolist() == [1, 1]
    assert batch.rollout_log_probs is None
    with pytest.raises(UserError, match="--label-key"):
        config = config.replace(label_key=None)
        generate(manager(config, attempt=1), 1)


def test_parquet_replaces_an_earlier_try(tmp_path: Path) -> None:
    write_table(pa.table({"a": [1]}), tmp_path)
    write_table(pa.table({"a": [1, 2]}), tmp_path)
    assert read_table(tmp_path).to_pydict() == {"a": [1, 2]}
    assert len(list(tmp_path.iterdir())) == 1


async def serve(config: Config, use: Any) -> Any:
    """Run the blocking `use(url)` against a server."""
    runner = web.AppRunner(make_app(manager(config), TOKEN))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        return await asyncio.to_thread(use, f"http://{host}:{port}")
    finally:
        await runner.cleanup()


def client(url: str) -> RolloutClient:
    return RolloutClient(url, TOKEN)


def test_the_trainer_gets_batches_metrics_and_evaluations_over_http(custom, make_args) -> None:
    def use(url: str) -> None:
        client(url).load(0)
        table, metrics = client(url).generate(0)
        assert table.column_names == TRAIN_COLUMNS and table.num_rows == 8
        assert metrics["rollout/tokens"] == 24
        assert client(url).eval(1)["eval/dev"] == 1.0  # samples 8 to 15

    asyncio.run(serve(batch_args(make_args), use))


def test_requests_for_one_step_at_the_same_time_share_one_batch(custom, make_args) -> None:
    def use(url: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(4) as pool:
            tables = list(pool.map(lambda _: client(url).generate(0)[0], range(4)))
        assert all(table.equals(tables[0]) for table in tables)
        assert client(url).generate(0)[0].equals(tables[0])

    asyncio.run(serve(batch_args(make_args, function="slow"), use))
    assert custom.calls == [(0, False)]


def test_errors_come_back_in_words(custom, make_args) -> None:
    def use(url: str) -> None:
        with pytest.raises(
            RolloutError, match=r"rollout 0, /generate: ZeroDivisionError: in the rollout function"
        ):
            client(url).generate(0)

    asyncio.run(serve(batch_args(make_args, function="fails"), use))


def test_without_the_token_everything_is_refused(custom, make_args) -> None:
    def use(url: str) -> None:
        for path, header in itertools.product(
            ("/load", "/weights", "/generate", "/eval"), (None, "Bearer wrong", TOKEN)
        ):
            headers = {} if header is None else {"Authorization": header}
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(url + path, b'{"rollout_id": 0}', headers))
            assert caught.value.code == 401, (path, header)

    asyncio.run(serve(batch_args(make_args), use))
    assert custom.calls == []


def test_a_body_without_a_rollout_id_is_refused(custom, make_args) -> None:
    def use(url: str) -> None:
        request = urllib.request.Request(f"{url}/generate", b"[]", {"Authorization": f"Bearer {TOKEN}"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400

    asyncio.run(serve(batch_args(make_args), use))


def test_samples_survive_json() -> None:
    sample = Sample(index=3, tokens=[1, 2], status=Sample.Status.ABORTED, metadata={"a": [1]}, label="x")
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample
