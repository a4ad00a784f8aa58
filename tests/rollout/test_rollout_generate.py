"""From samples to responses: retries, limits, seeds, custom functions and their mistakes."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKEN
from fakes.engine_server import FakeEngine, answer, fake_engine
from helpers.rollout import run_rollout, with_engine

from rltrain.rollout.eval import eval_sampling_params
from rltrain.rollout.generate import http, timing
from rltrain.rollout.generate.group import generate_and_grade
from rltrain.rollout.generate.http import GenerationError, HttpClient, post, set_client
from rltrain.rollout.generate.single_turn import generate, sampling_params, update_sample, with_seed
from rltrain.run.errors import UserError
from rltrain.sample import Sample

CUSTOM = """
import time

async def generate(args, sample, sampling_params, evaluation=False):
    what = sample.metadata["number"]
    if what == 0:
        raise KeyError("no such tool")
    if what == 1:
        return None
    if what == 2:
        sample.tokens = sample.tokens + [1, 1, 1]
        sample.response_length, sample.loss_mask = 3, [1]
        sample.status = sample.Status.COMPLETED
        return sample
    sample.append_response_tokens(tokens=[4, 5], log_probs=[-1.0, -2.0])
    sample.append_response_tokens(tokens=[6], trainable=False)
    sample.response = "eval" if evaluation else "train"
    sample.status = sample.Status.COMPLETED
    return sample

async def reward(args, sample):
    return 1.0
"""


TURNS = """
import asyncio
from rltrain.rollout.sglang_rollout import generate as turn

async def generate(args, sample, sampling_params):
    sample = await turn(args, sample, {**sampling_params, "max_new_tokens": 8})
    await asyncio.sleep(0.02)
    sample.append_response_tokens(tokens=[6], trainable=False)
    return await turn(args, sample, sampling_params)
"""

CUSTOM_FLAGS = (
    "--custom-generate-function-path",
    "custom_rollout.generate",
    "--custom-rm-path",
    "custom_rollout.reward",
    "--max-failed-fraction",
    "1",
)


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "custom_rollout.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_reward_process_asks_with_a_client_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> int:
        async with fake_engine(TOKEN) as engine:
            body = {"input_ids": [7], "sampling_params": {"max_new_tokens": 2}}
            with pytest.raises(RuntimeError, match="no HTTP client"):
                await post(f"{engine.url}/generate", body)
            monkeypatch.setenv("SLURMLIME_TOKEN", TOKEN)
            try:
                return len((await post(f"{engine.url}/generate", body))["output_ids"])
            finally:
                await http._get_client().close()
                set_client(None)

    assert asyncio.run(use()) == 2


def test_requests_that_find_nobody_are_tried_again() -> None:
    async def use(engine: FakeEngine, client: HttpClient) -> Any:
        engine.faults = [503, "drop", 500]
        body = {"input_ids": [7], "sampling_params": {"max_new_tokens": 2}}
        return len((await client.post(f"{engine.url}/generate", body))["output_ids"]), len(engine.requests)

    assert with_engine(use) == (2, 4)


def test_requests_that_are_refused_are_not() -> None:
    async def use(engine: FakeEngine, client: HttpClient) -> int:
        engine.faults = [400]
        with pytest.raises(GenerationError, match="400 a made-up fault"):
            await client.post(f"{engine.url}/generate", {})
        return len(engine.requests)

    assert with_engine(use) == 1


def test_trying_again_ends() -> None:
    async def use(engine: FakeEngine, client: HttpClient) -> None:
        engine.faults = [503] * 1000
        with pytest.raises(GenerationError, match="given up after"):
            await client.post(f"{engine.url}/generate", {}, retry_seconds=0.3)

    with_engine(use)


def test_a_request_that_was_served_for_long_is_tried_again() -> None:
    async def use(engine: FakeEngine, client: HttpClient) -> int:
        engine.faults = ["drop"]  # the engine dies of it
        slow = [0.5]

        async def before_answer(body: dict[str, Any]) -> None:
            await asyncio.sleep(slow.pop() if slow else 0.0)

        engine.before_answer = before_answer  # type: ignore[method-assign]
        body = {"input_ids": [7], "sampling_params": {"max_new_tokens": 2}}
        await client.post(f"{engine.url}/generate", body, retry_seconds=0.3)
        return len(engine.requests)

    assert with_engine(use) == 2


def test_a_rollout_fills_every_sample(make_args) -> None:
    engine, samples = run_rollout(make_args(), faults=[503])
    assert len(samples) == 8
    for sample in samples:
        assert sample.status is Sample.Status.TRUNCATED
        assert sample.tokens[sample.prompt_length :] == [sample.tokens[sample.prompt_length - 1]] * 16
        assert sample.rollout_log_probs == [-0.5] * 16 and sample.loss_mask == [1] * 16
        assert (sample.response, sample.weight_versions, sample.reward) == ("x" * 16, ["3"], 0.0)
        assert sample.generate_seconds > 0
    assert all(request["return_logprob"] is True for request in engine.requests)
    assert "sampling_seed" not in engine.requests[0]["sampling_params"]


def test_requests_in_flight_are_bounded(make_args) -> None:
    engine, _ = run_rollout(make_args("--sglang-server-concurrency", "3"))
    assert engine.most_in_flight == 3


def test_limits_on_the_context_shorten_the_response(make_args) -> None:
    engine, _ = run_rollout(make_args("--rollout-max-context-len", "9"))
    assert {request["sampling_params"]["max_new_tokens"] for request in engine.requests} == {5}
    config = make_args("--rollout-max-context-len", "4")
    with pytest.raises(
        RuntimeError, match=r"all 8 samples failed.*the prompt has 4 tokens, which leaves no room"
    ):
        run_rollout(config)
    later_turn = Sample(
        tokens=[5, 6, 7, 8], response_length=2
    )  # that is how a response of several turns ends
    assert (
        asyncio.run(generate(config.namespace, later_turn, {"max_new_tokens": 9})).status
        is Sample.Status.TRUNCATED
    )


def test_a_request_that_the_engine_refuses_fails_its_sample_only(make_args) -> None:
    _, samples = run_rollout(make_args(), faults=[400, "abort"])
    failed = [sample for sample in samples if sample.status is Sample.Status.FAILED]
    assert len(failed) == 2
    assert {sample.failure.split(": ")[-1] for sample in failed} == {"400 a made-up fault", "made up"}
    assert all(sample.reward is None and sample.response_length == 0 for sample in failed)


def test_when_all_fail_the_rollout_fails(make_args) -> None:
    with pytest.raises(RuntimeError, match=r"all 8 samples failed; the first error: .*400"):
        run_rollout(make_args(), faults=[400] * 8)


@pytest.mark.parametrize("ids", [[5, 64], [-1, 5], []])
def test_ids_outside_the_vocabulary_never_reach_the_engine(make_args, ids: list[int]) -> None:
    config = make_args()
    samples = [Sample(index=0, tokens=ids), Sample(index=1, tokens=[5, 63])]

    async def use(engine: FakeEngine, client: HttpClient) -> list[list[int]]:
        await generate_and_grade(config, samples, 0, sampling_params(config.rollout))
        return [request["input_ids"] for request in engine.requests]

    assert with_engine(use, config) == [[5, 63]]
    assert samples[0].status is Sample.Status.FAILED
    assert (
        "outside the model's vocabulary of 64" in samples[0].failure
        or "no prompt tokens" in samples[0].failure
    )


def test_deterministic_engines_get_a_seed_of_each_samples_own(make_args) -> None:
    config = make_args("--sglang-enable-deterministic-inference")

    def seeds() -> set[int]:
        engine, _ = run_rollout(config)
        return {request["sampling_params"]["sampling_seed"] for request in engine.requests}

    first = seeds()
    assert len(first) == 8 and first == seeds()
    same_step, other_step = (
        with_seed(config.engines, config.rollout, {}, step, Sample(index=0))["sampling_seed"]
        for step in (0, 1)
    )
    assert other_step not in first and same_step in first


def test_custom_functions_fill_samples_or_fail_them_alone(custom, make_args) -> None:
    config = make_args(*CUSTOM_FLAGS)
    _, samples = run_rollout(config)
    failures = [samples[2 * group].failure for group in range(3)]
    assert failures[0] is not None and failures[0].startswith("KeyError: 'no such tool' (custom_rollout.py:")
    assert "in generate\n    raise KeyError" in failures[0]  # the traceback is in the record
    assert failures[1] == "custom_rollout.generate returned a NoneType, not the sample that it was given"
    assert failures[2] == "custom_rollout.generate: loss_mask has 1 entries for 3 response tokens"
    good = samples[6]
    assert (good.reward, good.response, good.loss_mask) == (1.0, "train", [1, 1, 0])
    assert good.rollout_log_probs == [-1.0, -2.0, 0.0]


def test_where_the_time_of_a_rollout_went_is_recorded(custom, make_args, tmp_path: Path) -> None:
    (tmp_path / "custom_turns.py").write_text(TURNS)
    policy = ("--router-policy", "consistent_hashing")
    config = make_args("--custom-generate-function-path", "custom_turns.generate", *policy)
    engine, samples = run_rollout(config)
    for sample in samples:
        assert sample.decode_seconds >= 2 * 0.001 and sample.non_generation_time >= 0.02
        assert sample.decode_seconds + sample.non_generation_time <= sample.generate_seconds
        assert sample.queue_seconds > 0
    keys = Counter(engine.sessions)  # both turns of a sample go the same way, those of others another
    assert len(keys) == 8 and set(keys.values()) == {2} and None not in keys


def test_requests_side_by_side_are_not_taken_for_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests from 1 to 4 and from 2 to 6 s, of 10 s: for 5 s there was none."""
    clock = iter([0.0, 1.0, 6.0, 10.0])  # begun, the first request goes out, the last one ends, written
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times = timing.RequestTimes()
    meta = {"queue_time": 0.5, "forward_entry_time": 100.0, "prefill_finished_time": 100.25}
    times.request_began()
    times.request_began()
    times.request_ended({"meta_info": {**meta, "e2e_latency": 2.75}}, seconds=3.0)
    times.request_ended({"meta_info": {**meta, "e2e_latency": 3.75}}, seconds=4.0)
    sample = Sample()
    times.write_to([sample], waited=1.0)
    assert (sample.generate_seconds, sample.non_generation_time) == (10.0, 5.0)
    assert (sample.prefill_seconds, sample.decode_seconds) == (0.5, 2.0 + 3.0)
    assert sample.queue_seconds == 1.0 + (3.0 - 2.25) + (4.0 - 3.25)


def test_custom_functions_are_told_of_evaluations_if_they_want_to_know(custom, make_args) -> None:
    config = make_args(*CUSTOM_FLAGS)
    sample = Sample(index=0, tokens=[4], metadata={"number": 9})

    async def use(engine: FakeEngine, client: HttpClient) -> None:
        await generate_and_grade(config, [sample], 0, sampling_params(config.rollout), evaluation=True)

    with_engine(use, config)
    assert sample.response == "eval"


def test_without_a_reward_the_user_is_told(make_args) -> None:
    config = make_args()
    config = config.replace(rm_type=None)
    with pytest.raises(UserError, match="--custom-rm-path"):
        run_rollout(config)


def test_versions_of_a_response_that_saw_an_update_are_all_kept() -> None:
    output = answer({"sampling_params": {"max_new_tokens": 3}, "input_ids": [5]})
    output["meta_info"]["weight_versions"] = [
        {"version": "1", "start": 0, "end": 2},
        {"version": "2", "start": 2, "end": 3},
    ]
    assert update_sample(Sample(tokens=[5]), output).weight_versions == ["1", "2"]


def test_tokens_mask_and_log_probs_cannot_drift_apart() -> None:
    sample = Sample(tokens=[1, 2])
    sample.append_response_tokens(tokens=[5, 6], log_probs=[-1.0, -2.0])
    sample.append_response_tokens(tokens=[7], trainable=False)
    good = copy.deepcopy(sample)
    assert (sample.tokens, sample.prompt_length, sample.loss_mask) == ([1, 2, 5, 6, 7], 2, [1, 1, 0])
    assert (sample.rollout_log_probs, sample.effective_response_length) == ([-1.0, -2.0, 0.0], 2)
    with pytest.raises(ValueError, match="2 tokens but 1 log-probs"):
        sample.append_response_tokens(tokens=[8, 9], log_probs=[-1.0])
    with pytest.raises(ValueError, match="trained on need log-probs"):
        sample.append_response_tokens(tokens=[8])
    assert sample == good
    sample.tokens, sample.response_length = [*sample.tokens, 8], 4
    with pytest.raises(ValueError, match="4 tokens, 3 mask entries and 3 log-probs"):
        sample.append_response_tokens(tokens=[9], log_probs=[-1.0])
    with pytest.raises(ValueError, match="tokens without log-probs"):
        Sample(tokens=[1, 2], response_length=1).append_response_tokens(tokens=[9], log_probs=[-1.0])


def test_an_answer_without_log_probs_is_refused() -> None:
    output = answer({"sampling_params": {"max_new_tokens": 3}, "input_ids": [5]})
    del output["meta_info"]["output_token_logprobs"]
    with pytest.raises(GenerationError, match="no log-probs"):
        update_sample(Sample(tokens=[5]), output)
    for broken in (None, float("nan"), float("-inf")):
        output["meta_info"]["output_token_logprobs"] = [[-0.5, 5, None], [broken, 5, None]]
        with pytest.raises(GenerationError, match="not finite numbers"):
            update_sample(Sample(tokens=[5]), output)


def test_evaluation_has_sampling_parameters_of_its_own(make_args) -> None:
    config = make_args("--eval-temperature", "0", "--eval-max-response-len", "99", "--rollout-top-p", "0.9",
                     "--eval-prompt-data", "dev", "p.jsonl")  # fmt: skip
    params = eval_sampling_params(config.rollout, config.evaluation.eval_datasets[0])
    assert (params["temperature"], params["max_new_tokens"], params["top_p"]) == (0.0, 99, 0.9)
    assert (
        sampling_params(config.rollout)["temperature"],
        sampling_params(config.rollout)["max_new_tokens"],
    ) == (1.0, 16)


@pytest.mark.parametrize(
    ("spans", "last", "unknown"),
    [(["3"], "3", None), (["3", "4"], "4", None), (["default"], "default", "default"),
     (["default", "4"], "4", "default"), ([], "default", "default")],
)  # fmt: skip
def test_every_part_of_an_answer_has_to_come_from_known_weights(
    spans: list[str], last: str, unknown: str | None
) -> None:
    from rltrain.rollout.generate.http import _unknown_version

    meta = {"weight_version": last, "weight_versions": [{"version": each} for each in spans]}
    assert _unknown_version({"meta_info": meta}) == unknown
    assert _unknown_version([{"text": ""}]) is None
