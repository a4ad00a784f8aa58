"""Flags that name users' functions and their own configuration are checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml

from rltrain import arguments
from rltrain.arguments.declare import Declared, declared
from rltrain.arguments.groups.functions import Functions, check_functions
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout


def path(name: str) -> str:
    return f"custom_extensions.{name}"


def calls() -> list[Declared]:
    return [each for each in declared(Functions) if each.flag.call]


@pytest.mark.parametrize(
    "each", [each for each in calls() if each.flag.call.positional], ids=lambda each: each.name
)
def test_every_flag_refuses_a_function_that_takes_too_little(
    custom: Any, make_args: Any, each: Declared
) -> None:
    value = "custom_extensions.no_rollout_id"
    if len(each.flag.call.positional) == 1:
        value = "custom_extensions.two_arguments_too_many"
    config = make_args().replace(**{each.name: [value] if each.flag.append else value})
    with pytest.raises(UserError, match=each.option) as caught:
        check_functions(config.functions)
    assert value in str(caught.value)


@pytest.mark.parametrize("each", calls(), ids=lambda each: each.name)
def test_every_flag_refuses_a_function_that_is_not_there(custom: Any, make_args: Any, each: Declared) -> None:
    value = "custom_extensions.nowhere"
    config = make_args().replace(**{each.name: [value] if each.flag.append else value})
    with pytest.raises(UserError, match=f"{each.option} {value}"):
        check_functions(config.functions)


@pytest.mark.parametrize(
    ("flag", "name", "words"),
    [("--custom-generate-function-path", "sync_generate", "it is awaited, so it must be an `async def`"),
     ("--rollout-sample-filter-path", "async_filter", "it is not awaited, so it must be a plain `def`")],
)  # fmt: skip
def test_what_is_awaited_and_what_is_not_may_not_be_mixed_up(
    custom: Any, make_args: Any, flag: str, name: str, words: str
) -> None:
    with pytest.raises(UserError, match=f"{flag} {path(name)}.*{words}"):
        check_functions(make_args(flag, path(name)).functions)


def test_functions_that_fit_pass_the_check(custom: Any, make_args: Any) -> None:
    check_functions(make_args(
        "--custom-generate-function-path", path("generate"),
        "--rollout-sample-hook-path", path("hook"), "--rollout-sample-hook-path", path("async_hook"),
        "--dynamic-sampling-filter-path", path("every_third"), "--buffer-filter-path", path("newest"),
        "--rollout-all-samples-process-path", path("all_samples"), "--data-source-path", path("Reversed"),
        "--use-tis", "--custom-tis-function-path", "rltrain.algorithms.mismatch.mis",
        "--custom-pg-loss-reducer-function-path", "rltrain.algorithms.reduce.constant_length",
    ).functions)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.toml", "alpha = 1\nnested-name = 'x'"), ("c.json", '{"alpha": 1, "nested-name": "x"}'),
     ("c.yaml", "alpha: 1\nnested-name: x\n")],
)  # fmt: skip
def test_a_custom_config_becomes_attributes(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    flags = "--hf-checkpoint m --prompt-data p --rollout-batch-size 1 --num-rollout 1 --custom-config-path"
    config = arguments.parse([*flags.split(), str(tmp_path / name)])
    assert config.custom == {"alpha": 1, "nested_name": "x"}
    assert arguments.dump(config)["alpha"] == 1


def test_a_custom_config_reaches_every_role_as_it_was_written(tmp_path: Path) -> None:
    """TOML, as which the configuration is stored, has no null, and only text as keys."""
    text = """
bound: null
levels: [1, null, {deep: null, other: [2026-08-01]}]
day: 2026-08-01
moment: 2026-08-01T10:00:00Z
by_number: {1: one, null: none}
long: 123456789012345678901234567890
tiny: 1.0e-320
raw: !!binary aGVsbG8=
names: !!set {a, b}
rollout_top_k: null
'': empty
"""
    (tmp_path / "c.yaml").write_text(text)
    flags = "--hf-checkpoint m --prompt-data p --rollout-batch-size 1 --num-rollout 1 --custom-config-path"
    kwargs = ["--apply-chat-template-kwargs", '{"tools": null, "": [null]}']
    config = arguments.parse([*flags.split(), str(tmp_path / "c.yaml"), *kwargs])
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    layout.config.write_text(tomli_w.dumps({"train": arguments.dump(config)}))
    loaded = arguments.load(layout.root)
    wanted = yaml.safe_load(text)
    del wanted["rollout_top_k"]  # one of our own flags
    assert loaded.custom == wanted
    assert loaded.namespace.bound is None and loaded.rollout.rollout_top_k is None
    assert loaded.data.apply_chat_template_kwargs == {"tools": None, "": [None]}


@pytest.mark.parametrize(("text", "words"), [("a = ", "TOMLDecodeError"), (None, "there is no such file")])
def test_a_custom_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "c.toml").write_text(text)
    flags = "--hf-checkpoint m --prompt-data p --rollout-batch-size 1 --num-rollout 1 --custom-config-path"
    with pytest.raises(UserError, match=words):
        arguments.parse([*flags.split(), str(tmp_path / "c.toml")])
