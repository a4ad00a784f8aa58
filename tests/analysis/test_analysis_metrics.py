"""analysis.metrics: derived numbers against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.recorded_runs import steps_run

from analysis import Runs, load_run, load_runs, metrics


@pytest.fixture(scope="module")
def runs(recorded_runs: Path) -> Runs:
    return load_runs(recorded_runs)


def test_token_quantiles_against_a_plain_loop(runs: Runs) -> None:
    run = runs["baseline"]
    gaps = []
    for row in run.read_samples("tokens", steps=4).to_dict("records"):
        for mask, ours, theirs in zip(
            row["loss_mask"], row["trainer_log_probs"], row["rollout_log_probs"], strict=True
        ):
            if mask:
                gaps.append(float(ours) - float(theirs))
    found = metrics.token_quantiles(run, 4).loc[4]
    assert found["tokens"] == len(gaps)
    assert found["gap_q50"] == pytest.approx(np.median(gaps), abs=1e-12)
    assert found["ratio_q99"] == pytest.approx(np.quantile(np.exp(gaps), 0.99))
    assert metrics.token_quantiles(run, 4)["abs_gap_q75"].iloc[0] == pytest.approx(
        np.quantile(np.abs(gaps), 0.75)
    )


def test_reward_bands_share_out_every_sample() -> None:
    samples = pd.DataFrame({"step": 0, "reward": [-1, 0, 0.1, 0.5, 0.9, 1.0, 2.0, np.nan]})
    bands = metrics.reward_bands(samples)
    assert bands.loc[0].to_dict() == {
        "≤ 0": 0.25, "0 to ¼": 0.125, "¼ to ½": 0.125, "½ to ¾": 0, "¾ to 1": 0.125, "≥ 1": 0.25, "no reward": 0.125
    }  # fmt: skip


def test_lengths_and_zero_std_agree_with_the_recorded_metrics(runs: Runs) -> None:
    run = runs["hacked"]
    steps = run.steps.set_index("step")
    found = metrics.lengths(run.samples)
    np.testing.assert_allclose(found["mean"], steps["rollout/response_length"])
    np.testing.assert_allclose(found["truncated"], steps["rollout/truncated_ratio"])
    np.testing.assert_allclose(metrics.zero_std_share(run.groups), steps["rollout/zero_std_ratio"])


def test_pass_at_k_by_difficulty(runs: Runs) -> None:
    table = metrics.pass_at_k_by_difficulty(runs["baseline"])
    assert list(table.index.get_level_values(0).unique()) == [1, 2, 3]
    assert table["groups"].sum() == len(runs["baseline"].groups)
    early = table["pass@1"].unstack().loc[:, 4:10].mean(axis=1)
    assert early[1] > early[3]  # longer numbers are harder


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0.0), ("one two three", 0.0), ("a b c d e f g", 0.0), ("a b c d " * 3, 1 - 4 / 9)],
)
def test_repetition(text: str, expected: float) -> None:
    assert metrics.repetition(text) == pytest.approx(expected)


def test_staleness_counts_updates(runs: Runs) -> None:
    ages = metrics.staleness(runs["baseline"])
    assert len(ages) == 12
    assert (ages["max"] == 0).all()


def test_advantages_against_the_samples(runs: Runs) -> None:
    run = runs["baseline"]
    values = run.samples.loc[run.samples["step"] == 5, "train_reward"].to_numpy()
    row = metrics.advantages(run.samples).loc[5]
    assert row[["mean", "std", "min", "max", "zero"]].tolist() == pytest.approx(
        [values.mean(), values.std(ddof=1), values.min(), values.max(), (values == 0).mean()], abs=1e-12
    )


def test_recorded_steps_come_evenly_from_the_whole_run(runs: Runs) -> None:
    assert metrics.recorded_steps(runs["fast"], most=100) == list(range(12))
    assert metrics.recorded_steps(runs["fast"], most=3) == [0, 6, 11]


def test_what_overlaps_with_training_takes_no_time_of_the_step(tmp_path: Path) -> None:
    """With --max-staleness the trainer waits a second for a generation of nine."""
    row = {
        "perf/step_s": 10.0,
        "perf/generate_s": 8.0,
        "perf/reward_s": 1.0,
        "perf/rollout_s": 1.0,
        "perf/train_s": 8.5,
    }
    run = load_run(steps_run(tmp_path / "run", [{"step": 0, **row}], "[train]\ncolocate = false\n"))
    found = metrics.time_breakdown(run)["seconds"]
    assert found["generate"] == pytest.approx(8 / 9)
    assert found["reward"] == pytest.approx(1 / 9)
    assert found["other"] == pytest.approx(0.5)
    assert found.sum() == pytest.approx(10)
    assert len(run.doctor()) == 0  # the engines work nine tenths of the time
    row |= {"perf/generate_s": 1.0, "perf/reward_s": 0.0}
    run = load_run(steps_run(tmp_path / "idle", [{"step": 0, **row}], "[train]\ncolocate = false\n"))
    assert "engine GPUs wait" in run.doctor()[0].evidence


def test_the_gain_in_reward_is_of_the_last_tenth_over_the_first(tmp_path: Path) -> None:
    run = load_run(
        steps_run(tmp_path / "run", [{"step": i, "rollout/reward": float(i * i)} for i in range(24)])
    )
    assert metrics.cost(run)["reward_gain"] == (22**2 + 23**2) / 2 - (0 + 1) / 2


def test_cost_of_a_preempted_run(runs: Runs) -> None:
    run = runs["baseline"]
    cost = metrics.cost(run)
    lost = run.read_steps(every_attempt=True).query("attempt == 0 and step in (6, 7)")["perf/step_s"]
    assert cost["lost_steps"] == 2
    assert cost["lost_gpu_hours"] == pytest.approx(8 * lost.sum() / 3600)
    assert cost["productive_gpu_hours"] == pytest.approx(8 * run.steps["perf/step_s"].sum() / 3600)
    assert cost["goodput"] == pytest.approx(cost["productive_gpu_hours"] / run.attempts["gpu_hours"].sum())
    assert cost["queue_wait_s"] == run.attempts["wait_s"].sum()
    assert cost["reward_gain"] == run.steps["rollout/reward"].iloc[-1] - run.steps["rollout/reward"].iloc[0]
    tokens = metrics.tokens_per_gpu_second(run)
    first = run.steps.iloc[0]
    assert tokens[0] == pytest.approx(first["rollout/tokens"] / first["perf/step_s"] / 8)
