"""Functions written for slime do here what they do there; only their import lines differ."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fakes.engine_server import FakeEngine, answer, fake_engine
from helpers.rollout import manager, run_rollout, with_engine

import rltrain.slime
from rltrain.data.source import RolloutDataSource
from rltrain.inputs import check_inputs
from rltrain.rewards.distillation import post_process_rewards, reward_func
from rltrain.rollout.generate.returned import check_fields
from rltrain.rollout.generate.single_turn import GenerationError
from rltrain.rollout.train_data.convert import to_train_data
from rltrain.run.errors import UserError
from rltrain.sample import Sample

FUNCTIONS = """
from rltrain.slime import GenerateState, Sample, async_rm, load_function, post

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
    with pytest.raises(GenerationError, match="multimodal_inputs is set, and models that take images"):
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


def test_a_sample_may_name_its_own_reward(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "per_sample"))
    assert [sample.reward for sample in samples[1::2]] == [0.75] * 4
    assert all(sample.reward != 0.75 for sample in samples[::2])


def test_a_function_may_ask_for_the_reward_of_the_flags(functions: None, make_args: Any) -> None:
    _, samples = run_rollout(generating(make_args, "asks", "--custom-rm-path", "slime_functions.constant"))
    assert [sample.reward for sample in samples] == [1.5] * 8


def test_every_name_for_functions_written_for_slime_is_there() -> None:
    assert all(callable(getattr(rltrain.slime, name)) for name in rltrain.slime.__all__)
    assert rltrain.slime.load_function("os.path.join")("a", "b") == "a/b"
    verdicts = [rltrain.slime.call_dynamic_filter(each, 1) for each in (None, lambda _: False)]
    assert [verdict.keep for verdict in verdicts] == [True, False]


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
