"""Recorded runs that many tests read. No test writes into them; a test that changes a run copies it first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rltrain.run.layout import RunLayout


@pytest.fixture(scope="session")
def recorded_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the four runs of `analysis.demo_data`, 12 steps each."""
    from analysis import demo_data  # late, as most tests need no pandas

    directory = tmp_path_factory.mktemp("recorded_runs")
    demo_data.write_demo(directory, steps=12)
    return directory


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """The run of `helpers.synthetic_run` with 20 steps."""
    from helpers.synthetic_run import write_run

    return write_run(tmp_path_factory.mktemp("synthetic_run") / "demo", steps=20)


def steps_run(root: Path, rows: list[dict[str, float]], config: str = "") -> Path:
    """Write a run directory of nothing but these lines of metrics and this configuration."""
    root.mkdir(parents=True)
    RunLayout(root).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLayout(root).config.write_text(config)
    return root
