"""What `submit` understands: recipes, names, unknown flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from hpc.planning.request import SubmitOptions
from hpc.submitting.command_line import add_submit_flags, full_parser, read_request
from rltrain.arguments.recipes import SUBMIT_OPTIONS, builtin_recipes
from rltrain.run.errors import UserError


def test_recipes_from_left_to_right_then_flags(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("lr = 1\nseed = 1\nnum_rollout = 1\ncolocate = true")
    two.write_text("seed = 2\nnum_rollout = 2\ncolocate = false\n[submit]\nname = 'mine'")
    request = read_request([f"@{one}", "--num-rollout", "3", f"@{two}", "--runs-dir", str(tmp_path)])
    assert request.train == {"lr": ["1"], "seed": ["2"], "num-rollout": ["3"], "colocate": None}
    recipes = (str(one.resolve()), str(two.resolve()))
    assert request.options == SubmitOptions("mine", tmp_path, recipes=recipes, is_named=True)
    assert request.options.layout.root == tmp_path / "mine"


def test_built_in_recipes_are_known_by_name_and_parse() -> None:
    assert {"demo", "demo-sft"} <= set(builtin_recipes())
    for name in builtin_recipes():
        request = read_request([f"@{name}"])
        assert request.options.name == name
        assert request.train


def test_default_names(tmp_path: Path) -> None:
    recipe = tmp_path / "my-recipe.toml"
    recipe.write_text("lr = 1")
    assert read_request([]).options.name == "demo"
    assert read_request([f"@{recipe}"]).options.name == "my-recipe"
    folder = tmp_path / "capitals"
    folder.mkdir()
    (folder / "recipe.toml").write_text("lr = 1")
    assert read_request([f"@{folder / 'recipe.toml'}"]).options.name == "capitals"  # says what is trained
    assert read_request(["--lr", "1"]).options.name.startswith("run-2")
    assert read_request([f"@{recipe}", "--name", "other"]).options.name == "other"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--nmae", "x"], "unknown flag --nmae: did you mean --name?"),
        (
            ["--rollout-batchsize", "8"],
            "unknown flag --rollout-batchsize: did you mean --rollout-batch-size?",
        ),
        (["--sglang-mem-fraction-statik=1"], "did you mean --sglang-mem-fraction-static?"),
        (["@dmo"], "no such built-in recipe; near are @demo"),
        (["@/nosuch/file.toml"], "@/nosuch/file.toml: there is no such file"),
        (["--name", "../x"], "--name '../x'"),
        (["--name", ".hidden"], "--name '.hidden'"),
        (["--name", "a" * 101], "at most 100 characters"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--array=1-4"], "--sweep FLAG=A,B"),
        (["--slurm.sbatch.array=1-4"], "Use --sweep"),
        (["--nodes", "two"], "--nodes: invalid int value: 'two'"),
        (["--dry-run", "yes"], "--dry-run: ignored explicit argument 'yes'"),
    ],
)
def test_bad_command_lines(argv: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        read_request(argv)
    assert complaint in str(caught.value)


def test_unknown_flag_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("leraning-rate = 1\n[optimizer]\nweight_decoy = 0.1")
    with pytest.raises(UserError, match="unknown flag"):
        read_request([f"@{recipe}"])


def test_help_shows_both_kinds_of_flags_in_groups() -> None:
    text = full_parser().format_help()
    for expected in ("submit:", "--runs-dir DIR", "evaluation:", "--eval-interval N", "@demo-sft"):
        assert expected in text


def test_a_wandb_key_is_not_among_the_flags_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment")
    request = read_request(["--wandb-key", "secret-1234", "--lr", "1e-3"])
    assert "secret-1234" not in repr(request)
    assert os.environ["WANDB_API_KEY"] == "secret-1234"


def test_recipes_may_hold_every_option_of_submit() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_submit_flags(parser)
    assert {option.removeprefix("--") for option in parser._option_string_actions} == SUBMIT_OPTIONS
