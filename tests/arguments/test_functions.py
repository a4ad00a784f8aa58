"""Functions named by import path: found without importing, refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain import arguments
from rltrain.arguments import slime_names
from rltrain.arguments.groups.functions import (
    DEFAULT_DATA_SOURCE,
    DEFAULT_ROLLOUT_FUNCTION,
    SFT_ROLLOUT_FUNCTION,
)
from rltrain.functions import check_function, explain, load_function
from rltrain.run.errors import UserError


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    source = (
        "from os.path import join as joined\nraise_if_imported = 1 / 0\nasync def reward(args, sample): ...\n"
    )
    (tmp_path / "user_module_that_fails.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return "user_module_that_fails"


def test_check_finds_functions_without_running_the_module(user_module: str) -> None:
    check_function(f"{user_module}.reward", flag="--custom-rm-path")
    check_function(f"{user_module}.joined", flag="--custom-rm-path")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{}.rewrd", "did you mean reward?"),
        ("no_such_module_at_all.f", "no module no_such_module_at_all"),
        ("no_such_package.inner.f", "no module no_such_package.inner"),
        ("reward", "import path such as"),
        ("{}.not-a-name", "import path such as"),
    ],
)
def test_check_says_what_is_missing(user_module: str, name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_function(name.format(user_module), flag="--custom-rm-path")
    assert words in str(caught.value)
    assert "--custom-rm-path" in str(caught.value)


def test_check_names_the_line_of_a_syntax_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_user_module.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"broken_user_module.py:2"):
        check_function("broken_user_module.f", flag="--custom-rm-path")


def test_load_returns_the_function_or_says_why_not(user_module: str) -> None:
    assert load_function("os.path.join", flag="--x")("a", "b") == "a/b"
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_function(f"{user_module}.reward", flag="--x")
    with pytest.raises(UserError, match=r"no function sepp"):
        load_function("os.path.sepp", flag="--x")


REQUIRED = ["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "8", "--num-rollout", "4"]


def test_functions_that_come_with_slime_are_taken_from_where_they_are_here(tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text(
        "eval: {datasets: [{name: a, path: b, custom_rm_path: slime.rollout.on_policy_distillation.reward_func}]}"
    )
    mis = "examples.train_infer_mismatch_helper.mis.compute_mis_weights_with_cp"
    config = arguments.parse([
        *REQUIRED, "--rollout-function-path", "slime.rollout.sglang_rollout.generate_rollout",
        "--data-source-path", "slime.rollout.data_source.RolloutDataSourceWithBuffer",
        "--use-tis", "--custom-tis-function-path", mis, "--eval-config", str(tmp_path / "eval.yaml"),
    ])  # fmt: skip
    functions = config.functions
    assert functions.rollout_function_path == DEFAULT_ROLLOUT_FUNCTION
    assert functions.data_source_path == DEFAULT_DATA_SOURCE
    assert functions.custom_tis_function_path == "rltrain.algorithms.mismatch.mis"
    assert config.evaluation.eval_datasets[0]["custom_rm_path"] == "rltrain.rewards.distillation.reward_func"
    sft = [
        *REQUIRED,
        "--loss-type",
        "sft_loss",
        "--rollout-function-path",
        "slime.rollout.sft_rollout.generate_rollout",
    ]
    assert arguments.parse(sft).functions.rollout_function_path == SFT_ROLLOUT_FUNCTION


def test_every_one_of_them_can_be_loaded() -> None:
    for theirs, ours in slime_names._OURS.items():
        assert callable(load_function(ours, flag=theirs))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rollout-function-path fully_async_rollout.generate_rollout_fully_async", "--max-staleness K"),
        ("--custom-rm-path slime.rollout.rm_hub.async_rm", "--rm-type has these rewards"),
        ("--custom-generate-function-path slime.agent.new.generate", "has no counterpart here"),
        (
            "--rollout-sample-hook-path slime_plugins.a.b",
            "--rollout-sample-hook-path slime_plugins.a.b comes with",
        ),
    ],
)
def test_those_that_have_no_counterpart_are_refused_at_once(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        arguments.parse([*REQUIRED, *flags.split()])


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("megatron/core/parallel_state.py", "only functions that run in the trainer can ask for them"),
        ("megatron/training/global_vars.py", "Use the args that the function gets"),
    ],
)
def test_megatrons_state_is_the_trainers_alone(file: str, words: str) -> None:
    # Stands for Megatron's own file: importing that takes seconds, and other tests of this process form its groups.
    ask = compile("def ask():\n    assert False, 'group is not initialized'", f"/lib/{file}", "exec")
    found: dict = {}
    exec(ask, found)
    with pytest.raises(AssertionError) as caught:
        found["ask"]()
    assert words in explain(caught.value) and "group is not initialized" in explain(caught.value)
