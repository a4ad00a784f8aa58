"""Derived numbers against plain loops, the doctor against runs with known faults, compare, and every view."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import Runs, compare, demo_data, doctor, load_run, load_runs, metrics, plots
from hpc.layout import RunLayout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    demo_data.write_demo(directory)
    return directory


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    return load_runs(root)


def steps_run(root: Path, rows: list[dict[str, float]], config: str = "") -> Path:
    root.mkdir(parents=True)
    RunLayout(root).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLayout(root).config.write_text(config)
    return root


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
    assert len(ages) == 24
    assert (ages["max"] == 0).all()


def test_advantages_against_the_samples(runs: Runs) -> None:
    run = runs["baseline"]
    values = run.samples.loc[run.samples["step"] == 5, "train_reward"].to_numpy()
    row = metrics.advantages(run.samples).loc[5]
    assert row[["mean", "std", "min", "max", "zero"]].tolist() == pytest.approx(
        [values.mean(), values.std(ddof=1), values.min(), values.max(), (values == 0).mean()], abs=1e-12
    )


def test_recorded_steps_come_evenly_from_the_whole_run(runs: Runs) -> None:
    assert metrics.recorded_steps(runs["fast"], most=100) == list(range(24))
    assert metrics.recorded_steps(runs["fast"], most=3) == [0, 12, 23]


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


def test_cost_of_a_preempted_run(runs: Runs) -> None:
    run = runs["baseline"]
    cost = metrics.cost(run)
    lost = run.read_steps(every_attempt=True).query("attempt == 0 and step in (12, 13)")["perf/step_s"]
    assert cost["lost_steps"] == 2
    assert cost["lost_gpu_hours"] == pytest.approx(8 * lost.sum() / 3600)
    assert cost["productive_gpu_hours"] == pytest.approx(8 * run.steps["perf/step_s"].sum() / 3600)
    assert cost["goodput"] == pytest.approx(cost["productive_gpu_hours"] / run.attempts["gpu_hours"].sum())
    assert cost["queue_wait_s"] == run.attempts["wait_s"].sum()
    rewards = run.steps["rollout/reward"]
    assert cost["reward_gain"] == pytest.approx(rewards.tail(2).mean() - rewards.head(2).mean())
    tokens = metrics.tokens_per_gpu_second(run)
    first = run.steps.iloc[0]
    assert tokens[0] == pytest.approx(first["rollout/tokens"] / first["perf/step_s"] / 8)


def test_the_doctor_finds_what_was_put_in(runs: Runs) -> None:
    found = {run.name: {finding.name for finding in run.doctor()} for run in runs}
    assert {"kl-spike-after-resume", "lost-steps"} <= found["baseline"]
    assert {"mismatch-drift", "reward-hacking", "entropy-collapse", "truncation"} <= found["hacked"]
    assert "failed-run" in found["crashed"]
    serious = {"mismatch-drift", "reward-hacking", "entropy-collapse", "kl-spike-after-resume", "truncation"}
    assert not serious & found["fast"]
    for run in runs:
        for finding in run.doctor():
            assert callable(getattr(plots, finding.plot))


def test_rarer_findings(tmp_path: Path) -> None:
    rows = [
        {"step": i, "train/loss": 0.1, "train/lr": 1, "rollout/zero_std_ratio": 0.9, "rollout/reward": 0.0,
         "perf/step_s": 10, "perf/generate_s": 9}
        for i in range(12)
    ]  # fmt: skip
    rows[7]["train/loss"] = float("nan")
    config = "[train]\ncolocate = false\n"
    found = {f.name: f for f in load_run(steps_run(tmp_path / "run", rows, config)).doctor()}
    assert set(found) == {"not-finite", "zero-std-groups", "idle-roles"}
    assert "step 7" in found["not-finite"].evidence
    assert "too hard" in found["zero-std-groups"].advice
    assert "trainer GPUs wait" in found["idle-roles"].evidence
    assert len(load_run(steps_run(tmp_path / "empty", [])).doctor()) == 0


def test_findings_of_samples_that_are_old_or_failed(runs: Runs, tmp_path: Path) -> None:
    """Versions change within a sample, as they do when engines get new weights while they generate."""
    layout = RunLayout(tmp_path / "run")
    source = RunLayout(Path(runs["fast"].path))
    for step in range(6, 12):
        table = pq.read_table(source.step_dir(step, 0) / "part-0.parquet", partitioning=None)
        columns = {"weight_versions": [[str(step - 3), str(step - 2)]] * len(table),
                   "failure": ["ValueError: no number\nTraceback (most recent call last):\n  File x\n"] * len(table),
                   "status": ["failed"] * len(table)}  # fmt: skip
        for name, values in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pa.array(values, table.schema.field(name).type))
        layout.step_dir(step, 0).mkdir(parents=True)
        pq.write_table(table, layout.step_dir(step, 0) / "part-0.parquet")
    run = load_run(layout.root)
    assert metrics.staleness(run).values.tolist() == [[2.5, 3, 1]] * 6
    found = {f.name: f for f in run.doctor()}
    assert set(found) == {"stale-weights", "failed-samples"}
    assert "2.5 updates before" in found["stale-weights"].evidence
    assert found["failed-samples"].evidence == "288 of 288 samples failed, mostly: ValueError: no number"


def test_mismatch_is_shown_token_by_token(runs: Runs) -> None:
    run = runs["hacked"]
    [finding] = [finding for finding in run.doctor() if finding.name == "mismatch-drift"]
    last = metrics.token_quantiles(run, 23).loc[23]
    assert f"in step 23 one token in fifty has a ratio below {last['ratio_q01']:.3g}" in finding.evidence
    assert finding.plot == "token_gap"


def test_doctor_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([str(root / "baseline")]) == 1  # an error
    assert "kl-spike-after-resume" in capsys.readouterr().out
    assert doctor.main([str(root / "hacked")]) == 0
    assert doctor.main([str(root / "hacked"), "--fail-on", "warning", "--json"]) == 1
    printed = capsys.readouterr().out
    findings = json.loads(printed[printed.index("[\n") :])
    assert {"name", "severity", "evidence", "plot", "advice"} == set(findings[0])
    assert doctor.main([str(root / "baseline"), "--fail-on", "never"]) == 0
    assert doctor.main([str(root / "nothing")]) == 2


def test_compare_finds_where_runs_part(tmp_path: Path) -> None:
    rows = [
        {"step": i, "train/loss": 1 / (i + 1), "rollout/tokens": 100, "perf/step_s": 36.0} for i in range(10)
    ]
    other = [{**row, "train/loss": row["train/loss"] + (0.1 if row["step"] >= 6 else 0)} for row in rows]
    config = "[train]\nactor_num_gpus_per_node = 2\nlr = {}\n"
    a = load_run(steps_run(tmp_path / "a", rows, config.format(0.1)))
    b = load_run(steps_run(tmp_path / "b", other, config.format(0.2)))
    found = compare(a, b)
    assert found.given.loc["config.lr"].tolist() == [0.1, 0.2]
    assert len(found.given) == 1
    assert found.parted[["metric", "step"]].to_numpy().tolist() == [["train/loss", 6]]
    assert compare(a, load_run(a.path)).parted.empty
    assert "config.lr" in found._repr_html_()
    aligned = compare(a, b, align="gpu_hours")
    assert aligned.metrics.index[-1] == pytest.approx(10 * 36 * 2 / 3600)
    assert aligned.metrics["train/loss", "a"].iloc[-1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="choose from step, tokens, gpu_hours"):
        compare(a, b, align="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not record rollout/tokens"):
        compare(a, load_run(steps_run(tmp_path / "c", [{"step": 0}])), align="tokens")


def test_align_by_tokens_compares_equal_work(tmp_path: Path) -> None:
    """The same learning curve over tokens, in steps of 100 and of 200 tokens."""
    slow = [{"step": i, "rollout/tokens": 100, "rollout/reward": (i + 1) * 100} for i in range(20)]
    fast = [{"step": i, "rollout/tokens": 200, "rollout/reward": (i + 1) * 200} for i in range(10)]
    a, b = load_run(steps_run(tmp_path / "a", slow)), load_run(steps_run(tmp_path / "b", fast))
    assert compare(a, b).parted["metric"].tolist() == ["rollout/tokens", "rollout/reward"]
    by_tokens = compare(a, b, align="tokens")
    assert by_tokens.parted["metric"].tolist() == ["rollout/tokens"]
    assert by_tokens.metrics.index[[0, -1]].tolist() == [200, 2000]


VIEWS = ["reward_curve", "response_lengths", "logprob_gap", "token_gap", "time_breakdown", "entropy", "policy_kl",
         "grad_norm", "zero_std", "reward_bands", "pass_at_k", "staleness", "gpu_hours"]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_draws_a_whole_run_and_an_empty_one(view: str, runs: Runs, tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = getattr(plots, view)(runs["baseline"])
    assert ax.has_data()
    assert ax.get_xlabel()
    assert not [text for text in ax.texts if "nothing recorded" in text.get_text()]
    empty = load_run(steps_run(tmp_path / "empty", []))
    getattr(plots, view)(empty).figure.canvas.draw()
    plt.close("all")


def test_dashboard_shows_nine_views(runs: Runs) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = runs["hacked"].dashboard()
    assert len(figure.axes) == 9
    assert all(ax.get_title(loc="left") for ax in figure.axes)
    plots.comparison(runs).figure.canvas.draw()
    plt.close("all")
