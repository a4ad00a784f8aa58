"""Functions written for slime do here what they do there; only their import lines differ."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web
from fakes.engine_server import FakeEngine, answer, fake_engine
from helpers.rollout import manager, run_rollout, with_engine
from helpers.tiny_model import make_tokenizer

import rltrain.slime
from rltrain.data.source import RolloutDataSource
from rltrain.inputs import check_inputs
from rltrain.rewards.distillation import post_process_rewards, reward_func
from rltrain.rollout.generate.returned import check_fields
from rltrain.rollout.generate.single_turn import GenerationError
from rltrain.rollout.train_data.convert import to_train_data
from rltrain.run.errors import UserError
from rltrain.sample import Sample
from rltrain.schema import read_metrics

FUNCTIONS = """
import threading

from rltrain.slime import (
    GenerateState, RolloutFnTrainOutput, Sample, async_rm, generate_and_rm, generate_and_rm_group, generate_rollout,
    load_function, post, run,
)

async def turns(args, sample, sampling_params):
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    for turn in range(2):
        output = await post(url, {"input_ids": sample.tokens, "sampling_params": {"max_new_tokens": 3},
                                  "return_logprob": True})
        entries = output["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens(
            args, tokens=[entry[1] for entry in entries], log_probs=[entry[0] for entry in entries],
            trainable=True, meta_info=output["meta_info"], text=output["text"],
        )
        if turn == 0:
            found = state.tokenizer("12", add_special_tokens=False)["input_ids"]
            sample.append_response_tokens(args, tokens=found, trainable=False, text="12")
    sample.own_attribute = 7
    return sample

async def graded(args, sample, sampling_params):
    sample = await turns(args, sample, sampling_params)
    sample.reward = 0.25
    return sample

async def new_sample(args, sample, sampling_params):
    return Sample(prompt=sample.prompt, tokens=sample.tokens + [5, 6], response="ab", response_length=2,
                  loss_mask=[1, 0], rollout_log_probs=[-1.0, 0.0], status=Sample.Status.COMPLETED)

async def asks(args, sample, sampling_params):
    sample = await turns(args, sample, sampling_params)
    sample.reward = 2 * await async_rm(args, sample)
    return sample

async def constant(args, sample):
    return 0.75

async def as_dict(args, sample):
    return {"score": 0.5, "note": "short"}

async def per_sample(args, sample, sampling_params):
    sample = await turns(args, sample, sampling_params)
    sample.custom_rm_path = "slime_functions.constant" if sample.index % 2 else None
    return sample

async def twice(args, sample, sampling_params):
    other = Sample(**{**vars(sample), "tokens": list(sample.tokens)})
    return [await turns(args, sample, sampling_params), await turns(args, other, sampling_params)]

async def sets_a_lock(args, sample, sampling_params):
    args.lock, args.bonus = threading.Lock(), 0.5
    return await turns(args, sample, sampling_params)

async def bonus(args, sample):
    return args.bonus + hasattr(args, "lock")

async def raises(args, sample, sampling_params):
    if sample.index % 2:
        raise ValueError("no such tool")
    return await turns(args, sample, sampling_params)

async def collect(args, groups):
    state = GenerateState(args)
    tasks = [generate_and_rm_group(args, group, state.sampling_params.copy()) for group in groups]
    return [await task for task in tasks]

def own_rollout(args, rollout_id, data_source, evaluation=False):
    return RolloutFnTrainOutput(run(collect(args, data_source.get_samples(args.rollout_batch_size))), {"own": 1.0})

async def one_by_one(args, rollout_id, data_source, evaluation=False):
    params = GenerateState(args).sampling_params
    groups = data_source.get_samples(args.rollout_batch_size)
    return [[await generate_and_rm(args, sample, params, evaluation=False) for sample in group] for group in groups]

def wraps(args, rollout_id, data_source, evaluation=False):
    output = generate_rollout(args, rollout_id, data_source, evaluation)
    output.metrics["wrapped"] = float(len(output.samples))
    return output

async def of_group(args, samples):
    return [sum(len(each.tokens) for each in samples)] * len(samples)

def scores(args, samples):
    values = [sample.reward["score"] for sample in samples]
    return values, [2 * value for value in values]
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slime_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def generating(make_args: Any, name: str, *flags: str) -> Any:
    return make_args(
        "--custom-generate-function-path", f"slime_functions.{name}", "--apply-chat-template", *flags
    )


def test_turns_are_appended_as_slime_appends_them(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "turns"))
    for sample in samples:
        tool = sample.response_length - 6
        assert sample.failure is None and tool > 0
        assert sample.loss_mask == [1] * 3 + [0] * tool + [1] * 3
        assert sample.rollout_log_probs == [-0.5] * 3 + [0.0] * tool + [-0.5] * 3
        assert sample.response == "xxx12xxx" and sample.status is Sample.Status.TRUNCATED
        assert sample.weight_versions == ["3"]
        assert [(span["start"], span["end"]) for span in sample.weight_version_spans] == [
            (0, 3),
            (3 + tool, 6 + tool),
        ]
        assert sample.own_attribute == 7  # type: ignore[attr-defined]


def test_own_attributes_and_counters_come_back_after_a_restart(make_args: Any) -> None:
    config = make_args()
    source = RolloutDataSource(config.namespace)
    sample = Sample(index=3, tokens=[1, 2])
    sample.own_attribute = {"turn": 2}  # type: ignore[attr-defined]
    meta = answer({"sampling_params": {"max_new_tokens": 1}, "input_ids": [5]})["meta_info"]
    meta |= {"cached_tokens": 3, "prompt_tokens": 4, "completion_tokens": 6}
    meta |= {"spec_verify_ct": 2, "spec_accept_token_num": 3, "spec_draft_token_num": 4}
    sample.append_response_tokens(None, tokens=[5], log_probs=[-0.5], meta_info=meta)
    source.add_samples([[sample]])
    source.save(0)
    other = RolloutDataSource(config.namespace)
    other.load(0)
    ((back,), *_) = other.get_samples(1)
    assert vars(back) == vars(sample) and back.own_attribute == {"turn": 2}  # type: ignore[attr-defined]
    assert back.prefix_cache_info.prefix_cache_hit_rate == 0.75
    assert (back.spec_info.spec_accept_rate, back.spec_info.spec_accept_length) == (0.75, 3.0)


def test_a_part_of_an_answer_leaves_the_status(make_args: Any) -> None:
    sample = Sample(tokens=[1])
    meta = answer({"sampling_params": {"max_new_tokens": 2}, "input_ids": [5]})["meta_info"]
    sample.append_response_tokens(
        tokens=(5, 6), log_probs=(-1.0, -2.0), meta_info=meta, update_terminal_info=False
    )
    assert sample.status is Sample.Status.PENDING and sample.weight_versions == ["3"]
    sample.append_response_tokens(tokens=[], text="")
    assert sample.tokens == [1, 5, 6]


def test_images_are_refused_with_the_reason(make_args: Any) -> None:
    with pytest.raises(GenerationError, match="multimodal_inputs is set, but models that take images"):
        check_fields(make_args().rewards, Sample(multimodal_inputs={"images": ["a"]}), "mine")


def test_a_function_may_return_a_new_sample(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "new_sample"))
    assert [(sample.group_index, sample.index, sample.rollout_id) for sample in samples] == [
        (i // 2, i, i) for i in range(8)
    ]
    assert all(sample.loss_mask == [1, 0] and sample.reward is not None for sample in samples)
    assert samples[0].label is not None


def test_a_function_that_sets_the_reward_needs_no_reward_flag(functions: None, make_args: Any) -> None:
    config = generating(make_args, "graded", "--random-init").replace(rm_type=None)
    check_inputs(config)
    _, samples = run_rollout(config)
    assert [sample.reward for sample in samples] == [0.25] * 8
    with pytest.raises(UserError, match=r"have the generation function set sample.reward"):
        run_rollout(generating(make_args, "turns").replace(rm_type=None))
    with pytest.raises(UserError, match="no reward: give"):
        check_inputs(make_args("--random-init").replace(rm_type=None))


@pytest.mark.slow
def test_a_sample_may_name_its_own_reward(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "per_sample"))
    assert [sample.reward for sample in samples[1::2]] == [0.75] * 4
    assert all(sample.reward != 0.75 for sample in samples[::2])


@pytest.mark.slow
def test_a_function_may_ask_for_the_reward_of_the_flags(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "asks", "--custom-rm-path", "slime_functions.constant"))
    assert [sample.reward for sample in samples] == [1.5] * 8


def table_of(make_args: Any, rollout: str, generate: str, *flags: str) -> pa.Table:
    """The batch of a rollout function of the module above."""
    config = generating(make_args, generate, "--rollout-function-path", f"slime_functions.{rollout}", *flags)

    async def use(engine: FakeEngine, client: Any) -> pa.Table:
        return await manager(config).generate(0)

    return with_engine(use, config)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["own_rollout", "one_by_one", "wraps"])
def test_rollout_functions_that_generate_and_grade(functions: None, make_args: Any, rollout: str) -> None:
    """They make what the default one makes."""
    rows = table_of(make_args, rollout, "turns")
    _, expected = run_rollout(generating(make_args, "turns"))
    for name in ("index", "group_index", "tokens", "loss_mask", "reward"):
        assert rows[name].to_pylist() == [getattr(sample, name) for sample in expected], name
    metrics = read_metrics(rows.schema)
    own = {"own_rollout": "rollout/own", "wraps": "rollout/wrapped"}.get(rollout)
    assert metrics.get(own or "rollout/own") == {"own_rollout": 1.0, "wraps": 4.0}.get(rollout)


def test_such_a_function_keeps_rollouts_of_several_samples_together(functions: None, make_args: Any) -> None:
    rows = table_of(make_args, "own_rollout", "twice")
    assert rows["rollout_id"].to_pylist() == [i // 2 for i in range(16)]
    assert all(reward is not None for reward in rows["reward"].to_pylist())


@pytest.mark.slow
def test_such_a_function_fails_samples_alone_and_grades_groups(functions: None, make_args: Any) -> None:
    together = ("--group-rm", "--custom-rm-path", "slime_functions.of_group", "--max-failed-fraction", "0.5")
    rows = table_of(make_args, "own_rollout", "raises", *together).to_pylist()
    assert [row["status"] for row in rows] == ["truncated", "failed"] * 4
    assert [row["reward"] for row in rows] == [
        None if row["index"] % 2 else len(row["tokens"]) for row in rows
    ]


def test_a_coroutine_is_not_waited_for_in_its_own_loop(functions: None, make_args: Any) -> None:
    async def use(engine: FakeEngine, client: Any) -> None:
        with pytest.raises(RuntimeError, match="within the event loop"):
            rltrain.slime.run(asyncio.sleep(0))
        assert await rltrain.slime.generate_rollout(config.namespace, 0, RolloutDataSource(config.namespace))

    config = generating(make_args, "turns")
    with_engine(use, config)


def test_masks_of_conversations() -> None:
    """The assistant's turns with their end mark, but not one that is left out; against the text itself."""
    generator = rltrain.slime.MultiTurnLossMaskGenerator(make_tokenizer(), tokenizer_type="qwen3")
    ids, mask = generator.get_loss_mask(
        [
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "2", "step_loss_mask": 0},
            {"role": "user", "content": "and 2+2"},
            {"role": "assistant", "content": "is 4"},
            {"role": "tool", "content": "ok"},
            {"role": "assistant", "content": "so 4"},
        ]
    )
    text = "user:1+1.assistant:2.user:and 2+2.assistant:is 4.tool:ok.assistant:so 4."
    assert generator.tokenizer.decode(ids) == text and len(ids) == len(mask) == len(text)
    begins = [text.index("is 4."), text.index("so 4.")]
    assert [i for i, each in enumerate(mask) if each] == [first + i for first in begins for i in range(5)]
    assert generator.get_text_from_loss_mask(ids, mask) == ["is 4.", "so 4."]
    assert generator.get_response_lengths([mask, [0, 0], [1, 0, 1]]) == [len(text) - begins[0], 0, 3]


def test_scores_and_counts() -> None:
    score = rltrain.slime.compute_score
    assert score("Answer: \\boxed{7}", "7") == {"score": 1.0, "acc": 1.0, "pred": "7"}
    assert score("Answer: 7", "7", strict_box_verify=True)["pred"] == "[INVALID]"
    assert score("so \\boxed{7}", "8", strict_box_verify=True) == {"score": -1.0, "acc": 0.0, "pred": "7"}
    gatherer = rltrain.slime.MetricGatherer()
    for reason in ("equal", None, "equal"):
        gatherer.on_dynamic_filter_drop(reason)
    assert gatherer.collect() == {"rollout/dynamic_filter/drop_equal": 2}


@pytest.mark.slow
def test_what_a_function_sets_on_args_need_not_be_fit_for_another_process(
    functions: None, make_args: Any
) -> None:
    rewards = ("--custom-rm-path", "slime_functions.bonus")
    _, samples = run_rollout(generating(make_args, "sets_a_lock", *rewards))
    assert [sample.reward for sample in samples] == [0.5] * 8


def test_every_name_for_functions_written_for_slime_is_there() -> None:
    assert all(callable(getattr(rltrain.slime, name)) for name in rltrain.slime.__all__)
    assert rltrain.slime.load_function("os.path.join")("a", "b") == "a/b"
    verdicts = [rltrain.slime.call_dynamic_filter(each, 1) for each in (None, lambda _: False)]
    assert [verdict.keep for verdict in verdicts] == [True, False]


@pytest.mark.slow
def test_a_dict_reward_reaches_the_function_that_makes_numbers_of_it(functions: None, make_args: Any) -> None:
    dicts = ("--custom-rm-path", "slime_functions.as_dict")
    config = generating(
        make_args, "turns", *dicts, "--custom-reward-post-process-path", "slime_functions.scores"
    )

    async def table(engine: FakeEngine, client: Any) -> Any:
        return await manager(config).generate(0)

    rows = with_engine(table, config)
    assert rows["reward"].to_pylist() == [0.5] * 8 and rows["train_reward"].to_pylist() == [1.0] * 8
    _, samples = run_rollout(generating(make_args, "turns", *dicts))
    with pytest.raises(
        UserError, match="the reward is a dict with 'score', 'note': name one with --reward-key"
    ):
        to_train_data(make_args(), samples)


class Teacher(FakeEngine):
    """A server outside the job, so it asks for no key: scores the tokens that it is sent."""

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["sampling_params"]["max_new_tokens"] == 0 and body["logprob_start_len"] == 0
        entries = [[None if i == 0 else -0.1 * i, token, None] for i, token in enumerate(body["input_ids"])]
        return web.json_response({"meta_info": {"input_token_logprobs": entries}})


def test_a_teacher_behind_a_server_scores_the_response() -> None:
    graded, failed = Sample(tokens=[1, 2, 3, 4], response_length=2), Sample(status=Sample.Status.FAILED)

    async def use() -> dict[str, Any]:
        async with fake_engine("", Teacher) as teacher:
            args = argparse.Namespace(rm_url=f"{teacher.url}/generate")
            return await reward_func(args, graded)

    graded.reward = asyncio.run(use())
    raw, trained = post_process_rewards(argparse.Namespace(), [graded, failed])
    assert graded.teacher_log_probs == pytest.approx([-0.2, -0.3])
    assert (raw, trained, graded.reward) == ([0.0, None], [0.0, 0.0], 0.0)
