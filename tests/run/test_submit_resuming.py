"""A run is resumed by its own recipe only, and a flag that is given then acts or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from hpc.planning.request import Request, to_table
from hpc.submitting.command_line import read_request
from hpc.submitting.resuming import check_resume
from rltrain.arguments import flags as flag_data
from rltrain.run.errors import UserError


def request(directory: Path, *words: str) -> Request:
    return read_request([f"--runs-dir={directory / 'runs'}", *words])


def begin(directory: Path, *words: str, saved: bool = True) -> Request:
    """A run as `submit` would have begun it."""
    made = request(directory, *words)
    layout = made.options.layout
    layout.checkpoints.mkdir(parents=True)
    stored = {"flags": flag_data.to_table(made.train), "submit": to_table(made.options), "train": {}}
    layout.config.write_text(tomli_w.dumps(stored))
    if saved:
        (layout.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    return made


def again(first: Request, directory: Path, *words: str) -> list[str]:
    given = request(directory, *words)
    return check_resume(given.options, first.train, flag_data.merge(first.train, given.train))


@pytest.fixture
def recipes(tmp_path: Path) -> tuple[str, str]:
    for folder, lr in (("add", "0.1"), ("sort", "0.2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "grpo.toml").write_text(f"lr = {lr}\n")
    return f"@{tmp_path}/add/grpo.toml", f"@{tmp_path}/sort/grpo.toml"


def test_another_recipe_of_the_same_name_does_not_resume_the_run(
    tmp_path: Path, recipes: tuple[str, str]
) -> None:
    first = begin(tmp_path, recipes[0])
    assert first.options.name == "grpo" and again(first, tmp_path, recipes[0]) == []
    with pytest.raises(
        UserError,
        match=r"was made from recipe .*add/grpo.toml, not .*sort/grpo.toml.*--lr 0.1 → 0.2.*--name grpo",
    ):
        again(first, tmp_path, recipes[1])
    assert again(first, tmp_path, recipes[1], "--name=grpo") == ["--lr 0.1 → 0.2"]  # as it says


def test_changes_are_told_and_what_would_be_ignored_is_refused(
    tmp_path: Path, recipes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(tmp_path, recipes[0])
    assert again(first, tmp_path, recipes[0], "--clip-grad=2", "--colocate") == [
        "--clip-grad (not given) → 2",
        "--colocate (not given) → (given)",
    ]
    with pytest.raises(UserError, match=r"--seed .not given. → 7: the run grpo has a checkpoint"):
        again(first, tmp_path, recipes[0], "--seed=7", "--lr=1")
    with pytest.raises(UserError, match=r"--lora-rank .not given. → 8: the run grpo has a checkpoint"):
        again(first, tmp_path, recipes[0], "--lora-rank=8")
    begun = {**first.train, "hf-checkpoint": [str(tmp_path / "model")]}  # stored as an absolute path
    monkeypatch.chdir(tmp_path)
    given = flag_data.merge(begun, {"hf-checkpoint": ["model"]})
    assert check_resume(first.options, begun, given) == []
    new = begin(tmp_path / "unsaved", recipes[0], saved=False)
    assert again(new, tmp_path / "unsaved", recipes[0], "--seed=7") == ["--seed (not given) → 7"]
