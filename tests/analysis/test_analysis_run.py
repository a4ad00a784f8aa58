"""load_run: steps, events and configuration of a run directory, live, finished or damaged."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import DamagedFileError, DamagedFileWarning, RunNotFoundError, load_run
from analysis.frames.steps import phase_seconds
from analysis.reading.jsonl import _read_numbers, rows_frame
from rltrain.run.layout import RunLayout


def small_run(root: Path, *rows: dict[str, object] | str) -> Path:
    """A run directory of nothing but metrics; texts are written as they are."""
    root.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
    RunLayout(root).metrics.write_text("".join(lines))
    return root


def test_steps_have_one_row_each_of_the_newest_attempt(synthetic_run: RunLayout) -> None:
    steps = load_run(synthetic_run.root).steps
    assert list(steps["step"]) == [-1, *range(20)]
    # The run was stopped after step 11 and started again at step 10.
    assert list(steps["attempt"]) == [0] * 11 + [1] * 10
    lines = [json.loads(line) for line in synthetic_run.metrics.read_text().splitlines()[:-1]]
    expected = next(row for row in lines if row["step"] == 10 and row["attempt"] == 1)
    row = steps.set_index("step").loc[10]
    assert row["rollout/reward"] == expected["rollout/reward"]
    assert row["time"].timestamp() == pytest.approx(expected["time"])
    assert str(steps["time"].dt.tz) == "UTC"


def test_the_newest_attempt_wins_whatever_the_order_of_lines(tmp_path: Path) -> None:
    path = small_run(
        tmp_path / "run", {"step": 0, "attempt": 1, "rollout/reward": 1}, {"step": 0, "rollout/reward": 0}
    )
    assert list(load_run(path).steps["rollout/reward"]) == [1]


def test_lines_of_the_same_step_and_attempt_are_parts_of_one_row(tmp_path: Path) -> None:
    path = small_run(
        tmp_path / "run",
        {"step": 1, "attempt": 1, "a": 1, "b": 1},
        {"step": 0, "attempt": 0, "a": 5, "b": 6},
        {"step": 1, "attempt": 0, "a": 7, "c": 8},
        {"step": 1, "attempt": 1, "b": 2, "d": 3},
    )
    steps = load_run(path).steps.drop(columns="time")
    expected = pd.DataFrame(
        {"step": [0, 1], "attempt": [0, 1], "a": [5, 1], "b": [6, 2], "c": np.nan, "d": [np.nan, 3]}
    )
    pd.testing.assert_frame_equal(steps, expected, check_dtype=False)
    assert load_run(path).read_steps(every_attempt=True)["c"].tolist()[1] == 8


def test_a_line_that_is_being_written_is_left_out_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = small_run(tmp_path / "run", {"step": 0}, '{"step": 1, "train/lo')
    assert list(load_run(path, strict=True).steps["step"]) == [0]
    # Complete JSON without its newline may still grow: {"step": 1} of {"step": 12}
    path = small_run(tmp_path / "other", {"step": 0}, '{"step": 1}')
    assert list(load_run(path, strict=True).steps["step"]) == [0]
    assert not recwarn.list


@pytest.mark.parametrize("bad", ["{broken\n", "[1, 2]\n", '"\udcff"\n'])
def test_a_damaged_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "run"
    path.mkdir()
    RunLayout(path).metrics.write_bytes(
        b'{"step": 0}\n' + bad.encode(errors="surrogateescape") + b'{"step": 1}\n'
    )
    with pytest.warns(DamagedFileWarning, match=r"metrics\.jsonl:2 is damaged"):
        assert list(load_run(path).steps["step"]) == [0, 1]
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl:2 is damaged"):
        _ = load_run(path, strict=True).steps


VALUES = (
    st.none()
    | st.integers(-(2**53), 2**53)
    | st.floats(width=64)
    | st.just("text")
    | st.booleans()
    | st.just([1])
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["step", "a", "é/b"]), VALUES), max_size=5)


@given(ROWS)
def test_the_quick_way_to_read_metrics_gives_what_json_gives(rows: list[dict[str, object]]) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    quick = _read_numbers(lines)
    if quick is not None:
        pd.testing.assert_frame_equal(quick, rows_frame(rows), check_dtype=False)


def test_the_quick_way_is_taken_for_numbers_and_nothing_else() -> None:
    found = _read_numbers(b'{"a": 1, "b": NaN}\n{"a": -0.5, "c": null}\n{"a": Infinity}\n')
    assert found is not None
    np.testing.assert_equal(found["a"].tolist(), [1.0, -0.5, np.inf])
    assert found[["b", "c"]].isna().all(axis=None)
    for other in [b'{"a": "x"}', b'{"a": {"b": 1}}', b"[1]", b'{"a": 1}\n{"a', b""]:
        assert _read_numbers(other) is None
    # pyarrow takes these, but they are not one object a line.
    for other in [b'{"a": 1}{"a": 2}', b'{"a":\n1}{"a": 2}', b'{"a": 1}{"a": 2}\n\n{"a": 3}', b'{"a":\n1}\n']:
        assert len(pyarrow.json.read_json(pa.BufferReader(other)))
        assert _read_numbers(other) is None


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    RunLayout(tmp_path).config.write_text("[train\n")
    with pytest.warns(DamagedFileWarning, match=r"config\.toml is damaged"):
        assert load_run(tmp_path).config == {}


def test_events_are_in_order_and_in_utc(synthetic_run: RunLayout) -> None:
    events = load_run(synthetic_run.root).events
    assert list(events.columns[:5]) == ["time", "attempt", "kind", "role", "index"]
    assert events["time"].is_monotonic_increasing
    assert events["time"].iloc[0] == pd.Timestamp("2025-06-15 14:58:40", tz="UTC")
    finished = events[events["kind"] == "attempt_finished"]
    assert list(finished["state"]) == ["stopped", "finished"]
    assert list(finished["attempt"]) == [0, 1]


def test_a_run_that_has_just_begun_has_empty_frames(tmp_path: Path) -> None:
    RunLayout(tmp_path).config.write_text("[train]\nlr = 1e-3\n")
    run = load_run(tmp_path)
    assert run.config == {"train": {"lr": 1e-3}}
    for frame in (run.steps, run.events, run.samples, run.evals):
        assert len(frame) == 0
    assert {"step", "attempt", "time"} <= set(run.steps)
    assert {"step", "reward", "response_length"} <= set(run.samples)
    assert "steps 0" in repr(run)


def test_frames_are_read_once_and_again_by_load_run(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run", {"step": 0})
    run = load_run(path)
    assert run.steps is run.steps
    with RunLayout(path).metrics.open("a") as file:
        file.write('{"step": 1}\n')
    assert len(run.steps) == 1
    assert len(load_run(path).steps) == 2


def test_no_such_run_lists_the_runs_nearby(tmp_path: Path) -> None:
    for name in ("demo", "other"):
        small_run(tmp_path / "runs" / name, {"step": 0})
    (tmp_path / "runs" / "no-run").mkdir()
    with pytest.raises(RunNotFoundError) as caught:
        load_run(tmp_path / "runs" / "dmeo")
    message = str(caught.value)
    assert "does not exist" in message
    assert message.index("runs/demo") < message.index("runs/other")  # the likeliest first
    assert "no-run" not in message
    with pytest.raises(RunNotFoundError, match=r"holds no run.*runs/demo"):
        load_run(tmp_path / "runs")
    with pytest.raises(RunNotFoundError, match=r"runs/demo"):  # several levels that are not there
        load_run(tmp_path / "a" / "b")


def test_summary_is_short_and_escaped(tmp_path: Path) -> None:
    path = small_run(
        tmp_path / "<b>run", {"step": 0, "rollout/reward": 0.25}, {"step": 1, "rollout/reward": 0.5}
    )
    run = load_run(path)
    assert repr(run).endswith("steps 2, attempts 1, rollout/reward 0.25 → 0.5)")
    assert "<b>&lt;b&gt;run</b>" in run._repr_html_()


def test_phase_seconds_add_up_to_the_step(synthetic_run: RunLayout) -> None:
    steps = load_run(synthetic_run.root).steps
    seconds = phase_seconds(steps)
    assert list(seconds.index) == list(range(20))  # the evaluation before training is no step
    recorded = steps.set_index("step").loc[0:, "perf/step_s"]
    pd.testing.assert_series_equal(seconds.sum(axis=1), recorded, check_names=False)
    assert seconds["other"].to_numpy() == pytest.approx(0.2)
