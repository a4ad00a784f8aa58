"""Evaluation sets with settings of their own, and what several samples a prompt say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.engine_server import FakeEngine
from helpers.rollout import manager, with_engine

from rltrain import arguments
from rltrain.rollout.eval import eval_samples
from rltrain.rollout.train_data.metrics import (
    final_answer,
    majority_vote,
    pass_at_k,
    several_samples_metrics,
)
from rltrain.run.errors import UserError
from rltrain.sample import Sample

CONFIG = """
eval:
  defaults:
    n_samples_per_eval_prompt: 2
    temperature: 0.5
  datasets:
    - name: one
      path: {prompts}@[:2]
      rm_type: f1
      max_response_len: 3
    - name: two
      path: {prompts}@[2:3]
      n_samples_per_eval_prompt: 4
      rm_type: boxed_exact
      temperature: 0.25
"""


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_one() -> None:
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(each) for each in subsets]))
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["a", "b", "b"], [1.0, 0.0, 0.0], 0.0),
        (["a", "b", "b"], [0.0, 1.0, 1.0], 1.0),
        (["a", "b"], [1.0, 0.0], 1.0),  # a tie: the first
        (["", "", "b"], [0.0, 0.0, 1.0], 1.0),  # nobody votes for nothing
        (["", ""], [1.0, 1.0], 0.0),
    ],
)
def test_majority_vote(answers: list[str], rewards: list[float], expected: float) -> None:
    assert majority_vote(answers, rewards) == expected


def test_votes_are_counted_by_final_answer() -> None:
    assert final_answer(Sample(response=r"so \boxed{1,000}")) == "1000"
    assert final_answer(Sample(response="Answer: 12.")) == "12"
    assert final_answer(Sample(response=" 12 ")) == "12"
    assert final_answer(Sample(response="x", reward={"pred": "7"})) == "7"
    assert final_answer(Sample(response="x", status=Sample.Status.FAILED)) == ""


def test_metrics_of_several_samples() -> None:
    samples = [Sample(group_index=i // 4, response=text) for i, text in enumerate("aabcdeff")]
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    metrics = several_samples_metrics("dev", samples, rewards)
    assert metrics == pytest.approx({
        "eval/dev/avg@4": (0.5 + 0.25) / 2, "eval/dev/pass@1": 0.25, "eval/dev/pass@2": (5 / 6) / 2,
        "eval/dev/pass@4": 0.5, "eval/dev/maj@4": (1.0 + 0.5) / 2,
    })  # fmt: skip
    assert several_samples_metrics("dev", samples[:1], rewards[:1]) == {}
    odd = [Sample(group_index=0, response="a")] * 3
    assert set(several_samples_metrics("dev", odd, [1.0] * 3)) >= {"eval/dev/pass@2", "eval/dev/pass@3"}


def test_sets_are_generated_and_graded_in_their_own_way(
    make_args: Any, prompt_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "eval.yaml").write_text(CONFIG.format(prompts=prompt_file))
    config = make_args(
        "--eval-config", str(tmp_path / "eval.yaml"), "--eval-prompt-data", "plain", f"{prompt_file}@[:1]"
    )

    async def use(engine: FakeEngine, client: Any) -> Any:
        metrics = await manager(config).evaluate(0)
        return metrics, [request["sampling_params"] for request in engine.requests]

    metrics, params = with_engine(use, config)
    asked = sorted((each["temperature"], each["max_new_tokens"]) for each in params)
    assert asked == [(0.25, 16)] * 4 + [(0.5, 3)] * 4 + [(1.0, 16)]
    assert {"eval/plain", "eval/one", "eval/one/maj@2", "eval/two/pass@4"} <= metrics.keys()
    assert "eval/plain/avg@1" not in metrics
    assert [each["name"] for each in config.evaluation.eval_datasets] == ["plain", "one", "two"]


def test_limits_of_evaluations_are_their_own(make_args: Any, prompt_file: Path) -> None:
    """Of the 20 prompts, the ten of five tokens are too long; the others have a context of 7, so 3 more tokens."""
    config = make_args(
        "--eval-prompt-data", "dev", str(prompt_file), "--eval-max-prompt-len", "4", "--eval-max-context-len", "7",
        "--eval-min-new-tokens", "2", "--eval-tool-key", "instruments",
    )  # fmt: skip
    assert (
        config.of_eval_set(config.evaluation.eval_datasets[0]).data.tool_key
        == "instruments"
        != config.data.tool_key
    )

    async def use(engine: FakeEngine, client: Any) -> list[dict[str, Any]]:
        await manager(config).evaluate(0)
        return engine.requests

    requests = with_engine(use, config)
    assert len(requests) == 10 and {len(request["input_ids"]) for request in requests} == {4}
    params = [request["sampling_params"] for request in requests]
    assert {(each["max_new_tokens"], each["min_new_tokens"]) for each in params} == {(3, 2)}


def test_a_set_with_its_own_reward_does_not_take_the_trainings_function(make_args: Any) -> None:
    config = make_args("--custom-rm-path", "a.b", "--eval-prompt-data", "dev", "p.jsonl")
    same, own = config.evaluation.eval_datasets[0], {**config.evaluation.eval_datasets[0], "rm_type": "math"}
    assert config.of_eval_set(same).functions.custom_rm_path == "a.b"
    other = config.of_eval_set(own)
    assert (other.functions.custom_rm_path, other.rewards.rm_type) == (None, "math")


def test_sets_survive_the_configuration_file(make_args: Any, tmp_path: Path) -> None:
    import tomli_w

    config = make_args("--eval-prompt-data", "dev", "p.jsonl@[:3]")
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"train": arguments.dump(config)}))
    assert arguments.load(tmp_path).evaluation.eval_datasets == config.evaluation.eval_datasets


def refusal(tmp_path: Path, datasets: Any) -> str:
    (tmp_path / "e.json").write_text(json.dumps({"eval": {"datasets": datasets}}))
    flags = "--hf-checkpoint m --prompt-data p --rollout-batch-size 1 --num-rollout 1 --eval-config"
    with pytest.raises(UserError) as caught:
        arguments.parse([*flags.split(), str(tmp_path / "e.json")])
    return str(caught.value)


def test_what_is_wrong_with_a_config_is_named(tmp_path: Path) -> None:
    good = {"name": "a", "path": "p"}
    assert "did you mean temperature?" in refusal(tmp_path, [{**good, "temprature": 1}])
    assert "set 1 needs a name and a path" in refusal(tmp_path, [good, {"name": "b"}])
    assert "two evaluation sets" in refusal(tmp_path, [good, good])
    assert "becomes a directory" in refusal(tmp_path, [{**good, "name": "a/b"}])
    assert "no list of sets" in refusal(tmp_path, [])


def test_a_set_with_too_few_samples_that_did_not_fail_is_named(
    make_args: Any, tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(
        f"eval: {{datasets: [{{name: dev, path: '{prompt_file}@[:2]', min_eval_samples: 2,"
        " metadata_overrides: {split: dev}}]}"
    )
    config = make_args("--eval-config", str(file), "--eval-interval", "1")

    async def use(engine: FakeEngine, client: Any) -> Any:
        engine.faults = [400]
        return await manager(config).evaluate(0)

    metrics = with_engine(use, config)
    assert metrics["eval/dev/failed_ratio"] == 0.5
    assert (
        "set dev has 1 samples that did not fail, fewer than its min_eval_samples 2"
        in capsys.readouterr().out
    )
    samples = eval_samples(
        config.of_eval_set(config.evaluation.eval_datasets[0]), config.evaluation.eval_datasets[0]
    )
    assert [sample.metadata["split"] for sample in samples] == ["dev", "dev"]
