"""Frames beyond steps and samples: groups, attempts, tokens, messages, several runs, and two compared."""

from __future__ import annotations

import shutil
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.recorded_runs import steps_run
from hypothesis import given
from hypothesis import strategies as st

import hpc.accounting
from analysis import Run, RunNotFoundError, Runs, compare, load_run, load_runs, pass_at_k
from analysis.frames.events import ATTEMPT_COLUMNS, attempts_from_events, events_frame
from analysis.reading.vocabulary import Vocabulary, _byte_alphabet
from rltrain.run.layout import RunLayout

SAMPLE_KEYS = ["step", "attempt", "dataset", "group_index", "index"]


@pytest.fixture(scope="module")
def runs(recorded_runs: Path) -> Runs:
    return load_runs(recorded_runs)


@pytest.fixture(scope="module")
def baseline(runs: Runs) -> Run:
    return runs["baseline"]


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 70))
def test_pass_at_k_is_the_exact_fraction(n: int, correct: int, k: int) -> None:
    correct = min(correct, n)
    found = pass_at_k([n], [correct], k)[0]
    if k > n:
        assert np.isnan(found)
    else:
        exact = 1 - Fraction(comb(n - correct, k), comb(n, k))
        assert found == pytest.approx(float(exact), abs=1e-9)


def test_pass_at_k_refuses_what_makes_no_sense() -> None:
    for n, correct, k in [(3, 4, 1), (3, -1, 1), (3, 1, 0)]:
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k([n], [correct], k)


def test_groups_against_a_plain_loop(baseline: Run) -> None:
    groups = baseline.groups
    assert len(groups) == baseline.samples["group_index"].nunique()
    for row in groups.sample(20, random_state=0).to_dict("records"):
        rewards = baseline.samples.loc[
            baseline.samples["group_index"] == row["group_index"], "reward"
        ].tolist()
        assert row["n"] == len(rewards)
        assert row["reward_mean"] == pytest.approx(np.mean(rewards))
        assert row["reward_std"] == pytest.approx(np.std(rewards, ddof=1), abs=1e-12)
        assert row["zero_std"] == (len(set(rewards)) == 1)
        assert row["correct"] == rewards.count(1.0)
        assert row["pass@1"] == pytest.approx(rewards.count(1.0) / len(rewards))
    shares = groups.groupby("step")["zero_std"].mean()
    recorded = baseline.steps.set_index("step")["rollout/zero_std_ratio"]
    pd.testing.assert_series_equal(shares, recorded, check_names=False, check_index_type=False)


def test_attempts_tell_of_the_preemption(baseline: Run) -> None:
    attempts = baseline.attempts
    assert list(attempts["state"]) == ["PREEMPTED", "COMPLETED"]
    assert list(attempts["exit_code"]) == [75, 0]
    assert attempts["wait_s"].iloc[0] == 900
    assert attempts["wait_s"].iloc[1] == pytest.approx(1799)  # resubmitted a second after the end
    assert attempts["gpus"].tolist() == [8, 8]
    elapsed = (attempts["ended"] - attempts["started"]).dt.total_seconds()
    assert attempts["gpu_hours"].tolist() == pytest.approx((8 * elapsed / 3600).tolist())
    assert attempts["nodes"].iloc[0] == ["node01", "node02"]


def test_attempts_have_the_columns_of_the_accounting() -> None:
    assert hpc.accounting.COLUMNS == ATTEMPT_COLUMNS


def test_an_attempt_that_goes_on_is_running(recorded_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded_runs / "fast", tmp_path / "live")
    layout = RunLayout(tmp_path / "live")
    lines = layout.events.read_text().splitlines(keepends=True)[:-1]
    layout.events.write_text("".join(lines))
    runs = load_runs(tmp_path / "live")
    assert runs.attempts["state"].tolist() == ["RUNNING"]
    assert runs.attempts["ended"].isna().all()
    assert runs.attempts["elapsed_s"].iloc[0] > 0
    assert runs.runs["state"].tolist() == ["running"]


def test_an_attempt_ends_though_the_clock_of_its_node_jumps_back() -> None:
    kinds = ["attempt_started", "role_ready", "attempt_finished"]
    rows = [
        {"time": time, "attempt": 0, "kind": kind, "elapsed_s": elapsed}
        for kind, time, elapsed in zip(kinds, [9000.0, 9060.0, 5520.0], [0.0, 60.0, 120.0], strict=True)
    ]
    rows[-1]["state"] = "finished"
    (attempt,) = attempts_from_events(events_frame(rows), {}).to_dict("records")
    assert (attempt["state"], attempt["elapsed_s"]) == ("COMPLETED", 120.0)
    assert attempt["ended"] - attempt["started"] == pd.Timedelta(seconds=120)


def test_tokens_of_a_sample(baseline: Run) -> None:
    row = baseline.read_samples("all", steps=3).iloc[5]
    tokens = baseline.tokens(row)
    assert list(tokens.columns[:5]) == SAMPLE_KEYS
    response = tokens[tokens["part"] == "response"]
    assert len(tokens) == row["prompt_length"] + row["response_length"]
    assert "".join(response["token"]) == row["response"]
    np.testing.assert_array_equal(response["log_prob_engine"], row["rollout_log_probs"])
    np.testing.assert_allclose(
        response["gap"], np.subtract(row["trainer_log_probs"], row["rollout_log_probs"])
    )
    assert set(response["weight_version"]) == {"3"}
    assert tokens.loc[tokens["part"] == "prompt", ["log_prob_engine", "entropy"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(baseline.tokens(int(row["index"])), tokens)
    with pytest.raises(ValueError, match="no training sample with index -5"):
        baseline.tokens(-5)


def test_messages_split_where_a_tool_spoke(baseline: Run) -> None:
    rows = baseline.read_samples("all")
    tool = rows[[0 < sum(mask) < len(mask) for mask in rows["loss_mask"]]].iloc[0]
    messages = baseline.messages(tool)
    assert messages["role"].tolist() == ["system", "user", "assistant", "tool", "assistant"]
    assert messages["trained"].tolist() == [False, False, True, False, True]
    assert "".join(messages["content"].iloc[2:]) == tool["response"]
    assert messages["tokens"].sum() == tool["response_length"]
    evaluation = baseline.messages(baseline.evals.iloc[0])
    assert evaluation["dataset"].unique().tolist() == ["sums"]


def test_without_a_tokenizer_texts_are_missing_and_nothing_else(recorded_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded_runs / "fast", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    run = load_run(tmp_path / "run")
    tokens = run.tokens(5)
    assert tokens["token"].isna().all()
    assert tokens["id"].notna().all()
    assert run.messages(5)["role"].tolist() == ["system", "user", "assistant"]


def test_byte_level_vocabulary_gives_utf8_back() -> None:
    to_char = {byte: char for char, byte in _byte_alphabet().items()}
    assert sorted(to_char) == [bytes([i]) for i in range(256)]
    word = "".join(to_char[bytes([byte])] for byte in " naïve 😀".encode())
    vocabulary = Vocabulary(
        {
            "model": {"vocab": {word[:5]: 0, word[5:]: 1}},
            "decoder": {"type": "ByteLevel"},
            "added_tokens": [{"id": 2, "content": "<|end|>"}],
        }
    )
    assert vocabulary.decode([0, 1, 2, 9]) == " naïve 😀<|end|>⟨9⟩"
    assert vocabulary.texts([2, 9]) == ["<|end|>", None]


def test_long_steps_and_every_attempt(baseline: Run) -> None:
    every = baseline.read_steps(every_attempt=True)
    twice = every[every.duplicated("step", keep=False)]
    assert twice["step"].tolist() == [6, 6, 7, 7]
    assert twice["attempt"].tolist() == [0, 1, 0, 1]
    long = baseline.read_steps(long=True)
    assert list(long) == ["step", "attempt", "time", "metric", "value"]
    loss = long[long["metric"] == "train/loss"].set_index("step")["value"]
    pd.testing.assert_series_equal(loss, baseline.steps.set_index("step")["train/loss"], check_names=False)


def test_runs_carry_their_name_in_every_frame(runs: Runs) -> None:
    names = {"baseline", "fast", "hacked", "crashed"}
    assert set(runs.runs["run"]) == names
    for frame in (runs.steps, runs.samples, runs.groups, runs.evals, runs.events, runs.attempts):
        assert set(frame["run"]) <= names
        assert frame.columns[0] == "run"
    assert isinstance(runs.samples["status"].dtype, pd.CategoricalDtype)
    assert len(runs.samples) == sum(len(run.samples) for run in runs)
    table = runs.runs.set_index("run")
    assert table.loc["crashed", "state"] == "failed"
    assert table.loc["fast", "config.lr"] == 3e-5
    assert table.loc["fast", "version.torch"] == "2.14.0"
    assert table.loc["baseline", "wandb_url"] == "https://wandb.ai/demo-team/slurmlime/runs/demo-baseline"
    assert "hacked" in runs._repr_html_()
    with pytest.raises(KeyError, match="there are baseline"):
        runs["nothing"]


def test_load_runs_takes_patterns_and_lists(recorded_runs: Path) -> None:
    assert repr(load_runs(str(recorded_runs / "*a*"))) == "Runs(baseline, crashed, fast, hacked)"
    assert len(load_runs([recorded_runs / "fast", recorded_runs / "f*"])) == 1
    with pytest.raises(RunNotFoundError, match="baseline"):
        load_runs(recorded_runs / "nothing-*")


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
