"""The typed configuration: one declaration a flag, and slime's `args` in between."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import re
from pathlib import Path

import pytest

from rltrain import arguments
from rltrain.arguments.config import Config, groups
from rltrain.arguments.declare import declared

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "arguments.md"
MOST_NAMESPACES = 30  # docs/design.md says so, too
MOST_CONFIGS = 129  # lower it with every function that gets by with the groups that it needs
BASE = ["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "4", "--num-rollout", "3"]


def test_slimes_args_stay_at_the_edge() -> None:
    """Only functions with slime's signatures take them, argparse's own actions, and what makes a `Config` of them."""
    taken = parameters("Namespace")
    assert len(taken) <= MOST_NAMESPACES, "\n".join(taken)


def test_few_functions_take_the_whole_configuration() -> None:
    """The whole is for what reads many groups, or hands `args` on to functions of users."""
    taken = parameters("Config")
    assert len(taken) <= MOST_CONFIGS, "\n".join(taken)


def parameters(kind: str) -> list[str]:
    """Every parameter of the product whose annotation names a type, by its function."""
    paths = [path for room in ("hpc", "rltrain", "analysis") for path in (ROOT / room).rglob("*.py")]
    named = re.compile(rf"\b{kind}\b")
    return [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in paths
        if kind in (text := path.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if each.annotation is not None and named.search(ast.unparse(each.annotation))
    ]


def test_a_value_belongs_to_one_group_and_a_flag_is_declared_once() -> None:
    names = [field.name for kind in groups().values() for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))
    options = [each.option for kind in groups().values() for each in declared(kind)]
    assert len(options) == len(set(options))


def test_the_configuration_goes_to_slimes_args_and_back() -> None:
    config = arguments.parse([*BASE, "--rollout-stop", "a", "b", "--sglang-enable-metrics"])
    args = config.namespace
    assert isinstance(args, argparse.Namespace) and args is config.namespace
    assert args.rollout_stop == ["a", "b"] and args.sglang == {"enable_metrics": True}
    assert Config.of(args) == config and Config.of(args).namespace is args
    args.lr = 0.5  # as a function of a user may
    assert Config.of(args).optimizer.lr == 0.5 and config.optimizer.lr == 1e-6


def test_what_a_function_adds_to_a_default_is_not_there_for_the_next_configuration() -> None:
    before = copy.deepcopy(arguments.parse(BASE).values())
    for value in vars(arguments.parse(BASE).namespace).values():
        if isinstance(value, list):
            value.append("mine")
        elif isinstance(value, dict):
            value["mine"] = "too"
    assert arguments.parse(BASE).values() == before


def test_what_the_custom_file_adds_is_there_for_functions_of_users(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("alpha = 1\nlr = 3e-6\n")
    config = arguments.parse([*BASE, "--custom-config-path", str(tmp_path / "c.toml")])
    assert config.custom == {"alpha": 1} and config.optimizer.lr == 3e-6
    assert config.namespace.alpha == 1
    assert config.replace(lr=1.0).namespace.alpha == 1


def test_a_name_that_no_group_has_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError, match="no group has learning_rate"):
        Config().replace(learning_rate=1.0)


@pytest.mark.parametrize(
    "option",
    [each.option for kind in groups().values() for each in declared(kind) if each.flag.at_least is not None],
)
def test_numbers_that_are_too_small_are_refused(option: str) -> None:
    with pytest.raises(arguments.UserError, match=rf"{option} is -9(\.0)?: it must be at least "):
        arguments.parse([*BASE, f"{option}=-9"])


def test_numbers_that_are_too_large_or_none_are_refused() -> None:
    with pytest.raises(arguments.UserError, match=r"--rollout-top-p is 2\.0: it must be at most 1\."):
        arguments.parse([*BASE, "--rollout-top-p=2"])
    with pytest.raises(arguments.UserError, match=r"--lr is nan: a number is needed\."):
        arguments.parse([*BASE, "--lr=nan"])


def test_flags_that_are_always_on_say_so() -> None:
    config = arguments.parse([*BASE, "--balance-data", "--use-fault-tolerance", "--seq-length", "5"])
    assert arguments.remarks(config) == [
        "--balance-data has no effect: it is always on",
        "--seq-length is ignored: sequences are packed at their own lengths",
        "--use-fault-tolerance has no effect: it is always on",
    ]


@pytest.mark.parametrize("flags", [[], ["--balance-data", "--use-fault-tolerance"]])
def test_functions_of_users_find_that_it_is_on(flags: list[str]) -> None:
    config = arguments.parse([*BASE, *flags])
    assert config.namespace.balance_data is config.namespace.use_fault_tolerance is True
    assert Config.of(config.namespace).custom == config.custom == {}


def test_the_docs_name_our_own_flags() -> None:
    """Those that neither slime nor Megatron has: nobody can look them up there."""
    ours = {
        each.option
        for kind in groups().values()
        for each in declared(kind)
        if each.owner == "slurmlime" and each.flag.help
    }
    section = DOCS.read_text().partition("## Our own flags")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[\w-]+)`", section)) == ours
