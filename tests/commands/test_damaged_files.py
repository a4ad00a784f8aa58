"""Files of a run with damage in them: every command goes on with the rest, and names file and line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.run_files import make_run

from analysis import DamagedFileError, DamagedFileWarning, load_run, report
from analysis.pages.html import browse
from hpc import evaluate, resubmit, status, submit
from hpc.runs.live_view import describe_step
from hpc.runs.progress import RunFeed
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

LINES = """{"step": 0, "attempt": 0, "time": 1.0, "rollout/reward": 0.25}
{"step": "one", "attempt": 0, "time": 2.0}
{"step": 1, "attempt": 0, "time": 3.0, "rollout/reward": "high", "perf/step_s": [1], "train/loss": null}
{"step": 1e400, "attempt": 0}
{"step": 2, "attempt": {}, "time": 4.0}
{"step": 3, "attempt": 0, "time": "now", "rollout/reward": 0.5, "rollout/mine": NaN}
"""


def damaged_column(file: Path, column: str) -> None:
    """Write other bytes over a column's data, as a failing disk does."""
    group = pq.ParquetFile(file).metadata.row_group(0)
    found = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema == column)
    data = bytearray(file.read_bytes())
    start = found.dictionary_page_offset or found.data_page_offset
    data[start : start + found.total_compressed_size] = b"\xff" * found.total_compressed_size
    file.write_bytes(data)


@pytest.fixture
def odd_metrics(tmp_path: Path) -> RunLayout:
    layout = make_run(tmp_path, "x", phase="stopped", steps=0, attempts=1)
    layout.metrics.write_text(LINES)
    return layout


def test_metrics_of_the_wrong_type_are_named_with_their_line(odd_metrics: RunLayout) -> None:
    with pytest.warns(DamagedFileWarning) as warned:
        steps = load_run(odd_metrics.root).steps
    said = " ".join(str(each.message) for each in warned)
    for place in (
        "metrics.jsonl:2 is damaged and left out: step is 'one'", "metrics.jsonl:3 is damaged and left out: rollout",
        "metrics.jsonl:3 is damaged and left out: perf/step_s is [1]", "metrics.jsonl:4 is", "metrics.jsonl:5 is",
        "metrics.jsonl:6 is damaged and left out: time is 'now'",
    ):  # fmt: skip
        assert place in said
    assert steps["step"].tolist() == [0, 1, 3]
    assert steps["rollout/reward"].dropna().tolist() == [0.25, 0.5]
    with pytest.raises(DamagedFileError, match=r"metrics.jsonl:2 is damaged: step is 'one'"):
        _ = load_run(odd_metrics.root, strict=True).steps


def test_status_and_the_live_view_go_on(odd_metrics: RunLayout) -> None:
    [run] = status.status(runs_dir=odd_metrics.root.parent)
    assert (run.step, run.reward) == (4, 0.5)
    feed = RunFeed(odd_metrics)
    metrics, _ = feed.poll()
    assert [describe_step(record, 5, feed.state).partition("  ")[0] for record in metrics] == [
        "step 1/5", "step 2/5", "step 4/5"
    ]  # fmt: skip
    assert feed.state.series("rollout/reward") == [0.25, 0.5]


def test_events_of_the_wrong_type(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x", phase="stopped", steps=1, attempts=1)
    lines = [
        '{"time": "x", "kind": "a"}',
        '{"time": 1e300}',
        '{"time": 2.0, "attempt": "b", "index": 1e3, "kind": "c"}',
    ]
    layout.events.write_text("\n".join(lines) + "\n")
    with pytest.warns(DamagedFileWarning, match=r"events.jsonl:1 is damaged and left out: time is 'x'"):
        events = load_run(layout.root).events
    assert events["kind"].tolist() == ["c"] and events["attempt"].isna().all()


@pytest.mark.slow
@pytest.mark.parametrize("column", ["response", "tokens.list.element", "metadata"])
def test_a_damaged_column_costs_its_texts_only(recorded_runs: Path, tmp_path: Path, column: str) -> None:
    root = tmp_path / "fast"
    shutil.copytree(recorded_runs / "fast", root)
    damaged_column(RunLayout(root).sample_files()[3][0], column)
    run = load_run(root)
    with pytest.warns(DamagedFileWarning, match="step=000003"):
        page = browse(run)
    assert page.content
    with pytest.warns(DamagedFileWarning, match="step=000003"):
        assert report.main([str(root), "--no-dashboard", "-o", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("verb", ["submit", "resubmit", "evaluate"])
@pytest.mark.parametrize("text", ["x = [", "x = 1", "\xff"])
def test_verbs_that_start_a_run_say_that_its_configuration_is_damaged(
    verb: str, text: str, tmp_path: Path
) -> None:
    layout = make_run(tmp_path, "x", phase="stopped", steps=1, attempts=1)
    layout.config.write_bytes(text.encode("latin-1"))
    main, words = {
        "submit": (submit.submit, ["--name=x"]),
        "resubmit": (resubmit.main, ["x"]),
        "evaluate": (evaluate.main, ["x", "--step=1"]),
    }[verb]
    with pytest.raises(UserError, match=f"{layout.config} can't be read, so the run's flags are unknown"):
        main([*words, f"--runs-dir={tmp_path}"])
