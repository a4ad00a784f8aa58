"""The progress bar: only where work is slow, and a person looks."""

from __future__ import annotations

import sys

import pytest

from analysis import _progress


@pytest.mark.parametrize(
    ("patience", "is_tty", "shown"), [(-1.0, True, True), (-1.0, False, False), (600.0, True, False)]
)
def test_a_bar_only_where_it_is_slow_and_seen(
    patience: float,
    is_tty: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_progress, "_PATIENCE", patience)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_tty)
    monkeypatch.setenv("TERM", "xterm")
    assert list(_progress.progress([1, 2, 3], "reading runs")) == [1, 2, 3]
    assert ("reading runs" in capsys.readouterr().err) == shown
