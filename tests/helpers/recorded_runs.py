"""Recorded runs that many tests read. No test writes into them; a test that changes a run copies it first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.synthetic_run import write_run
from rltrain.run.layout import RunLayout


@pytest.fixture(scope="session")
def recorded_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the four runs of `analysis.demo_data`, 24 steps each."""
    return _write_demo(tmp_path_factory.mktemp("recorded_runs"), steps=24)


@pytest.fixture(scope="session")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs with 12 steps."""
    return _write_demo(tmp_path_factory.mktemp("short_runs"), steps=12)


@pytest.fixture(scope="session")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """The run of `helpers.synthetic_run` with 20 steps."""
    return write_run(tmp_path_factory.mktemp("synthetic_run") / "demo", steps=20)


def _write_demo(directory: Path, steps: int) -> Path:
    from analysis import demo_data  # late: most tests need no pandas

    demo_data.write_demo(directory, steps=steps)
    return directory


def steps_run(root: Path, rows: list[dict[str, float]], config: str = "") -> Path:
    """Write a run directory of nothing but these lines of metrics and this configuration."""
    root.mkdir(parents=True)
    RunLayout(root).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLayout(root).config.write_text(config)
    return root
