"""analysis.export: every frame as JSON lines and as Parquet that others can read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis import demo_data, export, load_runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    demo_data.write_demo(directory, steps=8)
    return directory


@pytest.mark.parametrize("frame", export.FRAMES)
def test_every_frame(frame: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = getattr(load_runs(root), frame)
    assert export.main([str(root), "--frame", frame, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(expected) > 0
    assert list(rows[0]) == list(expected)
    assert export.main([str(root), "--frame", frame, "--parquet", str(tmp_path / "frame.parquet")]) == 0
    table = pq.read_table(tmp_path / "frame.parquet")
    assert table.column_names == list(expected)
    assert len(table) == len(expected)


def test_no_such_run(tmp_path: Path) -> None:
    assert export.main([str(tmp_path / "nothing"), "--json"]) == 2
