"""rltrain.run.layout: which files of a run count."""

from __future__ import annotations

from pathlib import Path

from rltrain.run.layout import RunLayout


def test_trainer_files_are_the_newest_finished_ones(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    assert layout.trainer_files() == {}
    for step, attempt, name in [(3, 0, "part-0.parquet"), (3, 1, "part-0.parquet"), (3, 2, ".part-0.parquet"),
                                (1, 0, "part-0.parquet")]:  # fmt: skip
        directory = layout.trainer_dir(step, attempt)
        directory.mkdir(parents=True)
        (directory / name).touch()
    found = layout.trainer_files()
    assert list(found) == [1, 3]
    assert found[3] == [layout.trainer_dir(3, 1) / "part-0.parquet"]
    assert layout.trainer_files([9, 3]) == {3: found[3]}
    assert layout.steps() == []  # they are no samples
