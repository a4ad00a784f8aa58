"""Pictures of a run: what is drawn, not only that something is."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from helpers.recorded_runs import steps_run
from helpers.synthetic_run import LIMIT, write_run

from analysis import Run, Runs, load_run, load_runs, plots
from analysis.plot import main
from rltrain.run.layout import RunLayout

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VIEWS = [plots.reward_curve, plots.response_lengths, plots.logprob_gap, plots.time_breakdown]


@pytest.fixture(scope="module")
def run(synthetic_run: RunLayout) -> Run:
    return load_run(synthetic_run.root)


@pytest.fixture(scope="module")
def runs(recorded_runs: Path) -> Runs:
    return load_runs(recorded_runs)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_reward_curve_puts_evaluations_at_the_steps_done(run: Run) -> None:
    ax = plots.reward_curve(run)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["held out: sums"].get_xdata()) == [0, 5, 10, 15, 20]
    recorded = run.steps["eval/sums"].dropna()
    assert list(lines["held out: sums"].get_ydata()) == list(recorded)
    assert list(lines["training samples"].get_xdata()) == list(range(20))
    assert f"{recorded.iloc[-1]:.3g}" in [text.get_text() for text in ax.texts]
    assert "attempt 1" in [text.get_text() for text in ax.texts]


def test_response_lengths_show_median_and_limit(run: Run) -> None:
    ax = plots.response_lengths(run)
    median = next(line for line in ax.lines if line.get_label() == "median")
    expected = run.samples.groupby("step")["response_length"].median()
    assert list(median.get_ydata()) == list(expected)
    assert f"limit: {LIMIT} tokens" in [text.get_text() for text in ax.texts]


def test_logprob_gap_is_in_whole_decades(run: Run) -> None:
    ax = plots.logprob_gap(run)
    assert ax.get_yscale() == "log"
    assert ax.get_ylim() == pytest.approx((1e-6, 1e-4))


def test_time_breakdown_stacks_to_the_step(run: Run) -> None:
    ax = plots.time_breakdown(run)
    top = max((patch.get_data() for patch in ax.patches), key=lambda data: np.max(data.values))
    recorded = run.steps["perf/step_s"].dropna()
    assert list(top.values) == pytest.approx(list(recorded))
    assert list(top.edges) == [step - 0.5 for step in range(21)]


@pytest.mark.parametrize("view", VIEWS)
def test_views_draw_on_the_given_axes_with_units(run: Run, view) -> None:  # type: ignore[no-untyped-def]
    ax = plt.figure().add_subplot()
    assert view(run, ax) is ax
    assert ax.get_xlabel() in ("step", "training steps done")
    assert ax.get_ylabel() in (
        "mean reward",
        "response length (tokens)",
        "|trainer − engine| (nats)",
        "wall time (s)",
    )
    assert ax.get_legend() is not None


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_run_without_steps_say_so(tmp_path: Path, view) -> None:  # type: ignore[no-untyped-def]
    RunLayout(tmp_path).metrics.touch()
    assert "nothing recorded yet" in [text.get_text() for text in view(load_run(tmp_path)).texts]


def test_a_gap_of_exactly_zero_can_be_drawn(tmp_path: Path) -> None:
    RunLayout(tmp_path).metrics.write_text(json.dumps({"step": 0, "train/logprob_abs_diff": 0.0}) + "\n")
    ax = plots.logprob_gap(load_run(tmp_path))
    ax.figure.canvas.draw()
    assert ax.get_yscale() == "linear"


def test_command_writes_the_picture_into_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = write_run(tmp_path / "demo", steps=6)
    assert main([str(layout.root)]) == 0
    picture = layout.plots / "reward_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plt.imread(picture).shape[:2] == (1200, 1800)
    assert capsys.readouterr().out.strip() == str(picture)
    assert main([str(tmp_path / "dem")]) == 2
    assert "demo" in capsys.readouterr().err


ALL_VIEWS = ["reward_curve", "response_lengths", "logprob_gap", "token_gap", "time_breakdown", "entropy", "policy_kl",
         "grad_norm", "zero_std", "reward_bands", "pass_at_k", "staleness", "gpu_hours"]  # fmt: skip


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_every_view_draws_a_whole_run_and_an_empty_one(view: str, runs: Runs, tmp_path: Path) -> None:
    ax = getattr(plots, view)(runs["baseline"])
    assert ax.has_data()
    assert ax.get_xlabel()
    assert not [text for text in ax.texts if "nothing recorded" in text.get_text()]
    empty = load_run(steps_run(tmp_path / "empty", []))
    getattr(plots, view)(empty).figure.canvas.draw()


def test_dashboard_shows_nine_views(runs: Runs) -> None:
    figure = runs["hacked"].dashboard()
    assert len(figure.axes) == 9
    assert all(ax.get_title(loc="left") for ax in figure.axes)
    plots.comparison(runs).figure.canvas.draw()
