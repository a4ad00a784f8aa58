"""The lines of analysis/README.md for DuckDB and Polars, as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from analysis import load_run

README = (Path(__file__).parents[2] / "analysis" / "README.md").read_text()


@pytest.fixture(scope="module")
def expected(recorded_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pd.Series]:
    """Mean reward by step of runs/demo below the working directory, one step of which two attempts generated."""
    root = tmp_path_factory.mktemp("work")
    (root / "runs").mkdir()
    (root / "runs" / "demo").symlink_to(recorded_runs / "baseline")
    run = load_run(root / "runs" / "demo")
    assert len(run.read_steps(every_attempt=True)) > len(run.steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield run.samples.groupby("step")["reward"].mean()


def block(language: str, word: str) -> str:
    """The block of code in that language that holds the word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(code for code in blocks if word in code)


def test_duckdb(expected: pd.Series) -> None:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(block("sql", "read_parquet")).fetchall()
    assert [step for step, _ in found] == list(expected.index)
    assert [reward for _, reward in found] == pytest.approx(list(expected))


def test_polars(expected: pd.Series, capsys: pytest.CaptureFixture[str]) -> None:
    polars = pytest.importorskip("polars")
    names: dict[str, object] = {}
    with polars.Config(tbl_rows=-1):
        exec(block("python", "polars"), names)
    newest = names["newest"].group_by("step").agg(polars.col("reward").mean()).sort("step").collect()  # type: ignore[attr-defined]
    assert newest["step"].to_list() == list(expected.index)
    assert newest["reward"].to_list() == pytest.approx(list(expected))
    assert "step" in capsys.readouterr().out
