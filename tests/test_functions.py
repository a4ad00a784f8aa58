"""Functions named by import path: found without importing, refused with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.arguments import UserError
from rltrain.functions import check_function, load_function


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
