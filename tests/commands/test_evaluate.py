"""`python -m hpc.evaluate`: what it takes over from the run and refuses, and what the run's frames show."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import rich
import tomli_w
from helpers.run_files import make_run

from analysis import load_run
from analysis.live.server import LiveServer
from analysis.pages.data import meta_of
from analysis.plots.policy import reward_curve
from hpc.evaluate import evaluate, evaluation_flags, main
from hpc.runs.live_view import describe_step, panel
from hpc.runs.progress import RunState
from hpc.runs.summary import summary_rows
from hpc.submitting import start_run
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

TRAINED = {
    "lr": ["1e-6"], "rollout-batch-size": ["4"], "hf-checkpoint": ["/model"], "eval-prompt-data": ["dev", "/dev.jsonl"],
    "load": ["/older"], "save": ["/elsewhere"], "save-hf": ["/hf"], "ref-load": ["/older"], "num-rollout": ["60"],
    "wandb-run-id": ["abc"], "wandb-project": ["sums"], "load-debug-rollout-data": ["/x.parquet"], "num-epoch": ["2"],
}  # fmt: skip


def saved_run(runs: Path, steps: tuple[int, ...] = (20, 40), **flags: object) -> RunLayout:
    """A run with checkpoints, as far as can be told without reading them; one of them is still being written."""
    layout = make_run(runs, "demo", phase="stopped", attempts=1, steps=40)
    table = {"flags": {"lr": "1e-6", **flags}, "submit": {"max_restarts": 7}, "train": {"num_rollout": 60}}
    layout.config.write_text(tomli_w.dumps(table))
    for step in steps:
        (layout.checkpoints / f"iter_{step:07d}").mkdir(parents=True)
        (layout.checkpoints / f"iter_{step:07d}" / "manifest.json").write_text("{}")
    (layout.checkpoints / "iter_0000060").mkdir(parents=True, exist_ok=True)
    return layout


def test_an_evaluation_has_the_runs_flags_and_a_checkpoints_weights() -> None:
    flags = evaluation_flags(TRAINED, {"eval-temperature": ["0"]}, Path("/run/checkpoints"), 40)
    assert flags == {
        "lr": ["1e-6"], "rollout-batch-size": ["4"], "hf-checkpoint": ["/model"], "wandb-project": ["sums"],
        "eval-prompt-data": ["dev", "/dev.jsonl"], "eval-temperature": ["0"], "wandb-mode": ["disabled"],
        "load": ["/run/checkpoints"], "ckpt-step": ["40"], "finetune": [], "start-rollout-id": ["40"],
        "num-rollout": ["0"],
    }  # fmt: skip


def test_sets_that_are_given_replace_those_of_the_run() -> None:
    stored = {**TRAINED, "eval-config": ["/sets.yaml"]}
    flags = evaluation_flags(stored, {"eval-prompt-data": ["hard", "h.jsonl"]}, Path("/c"), 1)
    assert flags["eval-prompt-data"] == ["hard", "h.jsonl"] and "eval-config" not in flags
    flags = evaluation_flags(stored, {"eval-config": ["new.yaml"]}, Path("/c"), 1)
    assert flags["eval-config"] == ["new.yaml"] and "eval-prompt-data" not in flags


@pytest.mark.parametrize("flag", ["load", "save", "num-rollout", "ckpt-step", "wandb-run-id"])
def test_a_flag_that_would_do_nothing_is_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag}: an evaluation only looks at a checkpoint"):
        evaluation_flags(TRAINED, {flag: ["7"]}, Path("/c"), 1)


def test_what_can_not_be_evaluated_is_said(tmp_path: Path) -> None:
    layout = saved_run(tmp_path)
    with pytest.raises(UserError, match=r"no run 'dem'.*Did you mean demo"):
        evaluate("dem", runs_dir=tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 60: there are those of 20, 40"):
        evaluate("demo", step=60, runs_dir=tmp_path)
    with pytest.raises(UserError, match="the run has no evaluation sets: give --eval-prompt-data"):
        evaluate("demo", runs_dir=tmp_path)
    with pytest.raises(UserError, match="recipes are not accepted here"):
        evaluate("demo", flags=["@other.toml"], runs_dir=tmp_path)
    with pytest.raises(UserError, match="a run's name has letters"):
        evaluate("demo", flags=["--eval-prompt-data", "a", "a.jsonl"], name="a/b", runs_dir=tmp_path)
    layout.config.write_text("[flags]\nlr = ")
    with pytest.raises(UserError, match=r"demo/config\.toml can't be read"):
        evaluate("demo", runs_dir=tmp_path)
    layout.config.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"demo/config\.toml can't be read"):
        evaluate("demo", runs_dir=tmp_path)
    shutil.rmtree(layout.root)
    saved_run(tmp_path, steps=())
    with pytest.raises(UserError, match=r"demo has no checkpoint in .*checkpoints yet"):
        evaluate("demo", runs_dir=tmp_path)
    assert not layout.evaluations.exists()


def test_the_newest_checkpoint_is_evaluated_as_the_run_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = saved_run(tmp_path, **{"eval-prompt-data": ["dev", "/dev.jsonl"]})
    layout.root.chmod(0o750)
    asked = []
    monkeypatch.setattr(start_run, "submit_run", lambda options, flags: asked.append((options, flags)) or 0)
    assert main(["demo", "--runs-dir", str(tmp_path), "--partition=gpu", "--time", "1:00:00"]) == 0
    assert (
        main(["demo", "--runs-dir", str(tmp_path), "--step=20", "--name=greedy", "--eval-temperature=0"]) == 0
    )
    (first, flags), (second, others) = asked
    assert first.layout.root == layout.root / "evaluations" / "later-step-40" and flags["ckpt-step"] == ["40"]
    assert (first.time, first.max_restarts, first.share) == ("1:00:00", 7, True)
    assert second.layout == layout.evaluation("greedy", 20) and others["eval-temperature"] == ["0"]


def test_one_name_is_one_evaluation_of_a_step(tmp_path: Path) -> None:
    layout = saved_run(tmp_path, **{"eval-prompt-data": ["dev", "/dev.jsonl"]})
    own = layout.evaluation("later", 40)
    own.root.mkdir(parents=True)
    flags = {
        "lr": "1e-6",
        "eval-prompt-data": ["dev", "/dev.jsonl"],
        "wandb-mode": "disabled",
        "ckpt-step": "40",
    }
    flags |= {"load": str(layout.checkpoints), "finetune": True, "start-rollout-id": "40", "num-rollout": "0"}
    own.config.write_text(tomli_w.dumps({"flags": flags, "submit": {}, "train": {}}))
    with pytest.raises(
        UserError, match=r"already, with other flags \(--eval-top-k .* → 1\). Give .* another --name"
    ):
        evaluate("demo", flags=["--eval-top-k=1"], runs_dir=tmp_path)
    with pytest.raises(
        UserError, match="missing --hf-checkpoint"
    ):  # the same: it goes on to what a start checks
        evaluate("demo", runs_dir=tmp_path)


@pytest.mark.slow
def test_a_set_that_is_missing_and_the_script_of_a_job(
    demo_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo_assets, tmp_path / "data")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no Slurm
    model, prompts = str(tmp_path / "data/model"), str(tmp_path / "data/train.jsonl")
    taken = {"hf-checkpoint": model, "prompt-data": prompts, "rollout-batch-size": "4", "num-rollout": "60"}
    taken |= {
        "custom-rm-path": "rltrain.demo.task.reward",
        "label-key": "label",
        "random-init": True,
        "use-dynamic-batch-size": True,
        "max-tokens-per-gpu": "512",
    }
    layout = saved_run(tmp_path, **taken)
    words = [
        "demo",
        "--runs-dir",
        str(tmp_path),
        "--step",
        "20",
        "--partition",
        "gpu",
        "--nodes",
        "1",
        "--dry-run",
    ]
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        main([*words, "--eval-prompt-data", "few", "nothing.jsonl"])
    assert main([*words, "--eval-prompt-data", "few", str(tmp_path / "data/eval.jsonl")]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=later-step-20\n" in script and "evaluations/later-step-20/submitit" in script
    assert not layout.evaluations.exists()


def test_a_runs_evals_have_what_was_evaluated_later(recorded_runs: Path, tmp_path: Path) -> None:
    root = tmp_path / "fast"
    shutil.copytree(recorded_runs / "fast", root)
    layout, before = RunLayout(root), load_run(root)
    (step, *_) = steps = sorted(before.evals["step"].unique().tolist())
    with LiveServer(tmp_path) as server:
        assert server.live.run("fast")[1].block("meta")["total"] == len(before.samples) + len(before.evals)
        for each in steps:  # of the same samples, so that nothing but the name tells them apart
            later = layout.evaluation("again", each)
            shutil.copytree(layout.eval_dir("sums", each, 0).parent, later.eval_dir("sums", each, 0).parent)
            later.events.write_text("")
        assert server.live.run("fast")[1].block("meta")["total"] == len(before.samples) + 2 * len(
            before.evals
        )
        lines = server.live.lines(["fast"], ["eval/sums", "eval/again/sums"], "step")
    own, later = (lines["lines"]["fast"][name] for name in ("eval/sums", "eval/again/sums"))
    assert "eval/again/sums" in lines["metrics"] and later["x"] == own["x"] == [
        each - 1 for each in steps if each
    ]
    assert later["y"] == pytest.approx(own["y"])
    run = load_run(root)
    title, curves = meta_of(run, 0, 0, overview=True)["charts"][0]
    named = {each["label"]: each for each in curves}
    assert title == "Mean reward" and named["again/sums"]["x"] == named["sums"]["x"] == steps
    assert named["again/sums"]["y"] == pytest.approx(named["sums"]["y"])
    assert [line.get_label() for line in reward_curve(run).lines].count("held out: again/sums") == 1
    evals = run.evals
    assert (
        evals["dataset"].unique().tolist() == ["sums", "again/sums"] and evals["dataset"].dtype == "category"
    )
    own, later = (evals[evals["dataset"] == name].drop(columns="dataset") for name in ("sums", "again/sums"))
    pd.testing.assert_frame_equal(own.reset_index(drop=True), later.reset_index(drop=True))
    groups = run.read_groups(evals=True)
    assert set(groups["dataset"]) == {"sums", "again/sums"} and len(groups) == 2 * len(
        before.read_groups(evals=True)
    )
    sample = run.read_sample(evals[evals["dataset"] == "again/sums"].iloc[0])
    assert (sample["dataset"], sample["step"]) == ("again/sums", step) and isinstance(sample["response"], str)
    assert run.show(sample).content
    run.note(sample, "right now")
    assert run.notes["dataset"].tolist() == ["again/sums"]
    assert [name for name, _ in layout.later_evaluations()] == ["again"] * len(steps)
    assert layout.later_evaluations("other") == []


def test_the_terminal_says_which_weights(capsys: pytest.CaptureFixture[str]) -> None:
    state, row = RunState(), {"step": 39, "attempt": 0, "eval/dev": 0.5, "perf/eval_s": 2.0}
    state.add_metrics(row)
    assert describe_step(row, 0, state).startswith("weights of step 40  eval/dev 0.500")
    rows = dict(summary_rows(RunLayout(Path("x")), state, 0, 1.0))
    assert rows["weights"] == "of step 40" and "steps" not in rows
    rich.print(panel("x", state, 0, 1.0))
    assert "40/0" not in capsys.readouterr().out
