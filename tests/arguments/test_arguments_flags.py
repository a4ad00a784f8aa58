"""Flags as data: command lines, recipes, and merging them."""

from __future__ import annotations

import re
import tomllib

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.arguments import UserError, flags

NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
WORDS = st.text(st.characters(blacklist_categories=["Cs"], min_codepoint=32), min_size=1, max_size=8)
PLAIN_WORDS = WORDS.filter(lambda word: not word.startswith(("-", "@")))
VALUES = st.one_of(st.just([]), WORDS.map(lambda word: [word]), st.lists(PLAIN_WORDS, min_size=2, max_size=3))


def test_split_finds_recipes_values_and_both_spellings() -> None:
    recipes, found = flags.split(
        [
            "@demo",
            "--lr",
            "1e-3",
            "--eval-prompt-data",
            "a",
            "b",
            "@x/y.toml",
            "--use_kl_loss",
            "--seed=-1",
            "--k",
            "-1",
        ]
    )
    assert recipes == ["demo", "x/y.toml"]
    assert found == {
        "lr": ["1e-3"],
        "eval-prompt-data": ["a", "b"],
        "use-kl-loss": [],
        "seed": ["-1"],
        "k": ["-1"],
    }


@pytest.mark.parametrize("argv", [["lr"], ["@demo", "7"], ["--"]])
def test_split_refuses_words_without_a_flag(argv: list[str]) -> None:
    with pytest.raises(UserError, match="unexpected argument"):
        flags.split(argv)


def test_recipe_tables_group_and_values_become_words() -> None:
    text = """
        lr = 1e-3
        use_kl_loss = true
        colocate = false
        eval-prompt-data = ["test", "x.jsonl"]
        [rollout]
        rollout_batch_size = 8
        [rollout.deeper]
        rm-type = "math"
        [apply-chat-template-kwargs]
        enable_thinking = false
    """
    assert flags.from_toml(text, "r.toml", known={"apply-chat-template-kwargs"}) == {
        "lr": ["0.001"],
        "use-kl-loss": [],
        "colocate": None,
        "eval-prompt-data": ["test", "x.jsonl"],
        "rollout-batch-size": ["8"],
        "rm-type": ["math"],
        "apply-chat-template-kwargs": ['{"enable_thinking": false}'],
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lr = = 1", r"r\.toml is not valid TOML: .*line 1"),
        ("time = 1-12:00:00", r"not valid TOML: .*needs quotes"),
        ("lr = []", r"r\.toml: lr = \[\]"),
        ("lr = [1, true]", r"r\.toml: lr = \[1, True\]"),
        ("lr = 2024-01-01", r"r\.toml: lr = "),
        ("[a]\nlr = [[1]]", r"r\.toml: lr = "),
    ],
)
def test_recipe_errors_name_file_and_key(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        flags.from_toml(text, "r.toml")


def test_later_layers_win_and_false_takes_back() -> None:
    first = flags.from_toml("lr = 1\ncolocate = true", "a")
    second = flags.from_toml("colocate = false\nseed = 3", "b")
    merged = flags.merge(first, second, {"lr": ["2"]})
    assert flags.to_argv(merged) == ["--seed=3", "--lr=2"]


def test_a_time_needs_no_quotes() -> None:
    assert flags.from_toml("time = 12:00:00", "r.toml") == {"time": ["12:00:00"]}


@pytest.mark.slow
@given(st.dictionaries(NAMES, VALUES, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_command_line_and_toml_bring_flags_back(given_flags: flags.Flags) -> None:
    assert flags.split(flags.to_argv(given_flags)) == ([], given_flags)
    stored = tomllib.loads(tomli_w.dumps(flags.to_table(given_flags)))
    assert flags.from_table(stored, "config.toml") == given_flags


def test_a_value_may_look_like_anything() -> None:
    _, found = flags.split(["--rollout-stop=--x", "--name=@demo"])
    assert found == {"rollout-stop": ["--x"], "name": ["@demo"]}
    assert re.fullmatch(r"--rollout-stop=--x", flags.to_argv(found)[0])


def test_of_a_switch_and_its_no_form_the_later_counts() -> None:
    known = ("bf16", "no-bf16", "colocate")
    on, off = (flags.from_toml(f"bf16 = {word}", "r", known) for word in ("true", "false"))
    assert flags.to_argv(off) == ["--no-bf16"]
    assert flags.to_argv(flags.merge(on, off)) == ["--no-bf16"]
    assert flags.to_argv(flags.merge(off, on)) == ["--bf16"]
    given = flags.merge(on, {"no-bf16": []}, {"bf16": []})  # a run, stored, and a resume
    assert flags.to_argv(given) == ["--no-bf16", "--bf16"]
    assert flags.to_argv(flags.from_toml("colocate = false", "r", known)) == []
