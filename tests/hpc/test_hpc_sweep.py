"""Sweeps: what the words mean, and runs that are started from them on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.local_job import ASSUMED, Job
from helpers.run_files import lines_of

from hpc.runs.find import choose_runs
from hpc.submit import main
from hpc.submitting import start_run
from hpc.submitting.sweep import read_variants
from rltrain import inputs
from rltrain.run.errors import UserError


def test_every_combination_has_a_name_that_tells() -> None:
    variants = read_variants(["lr=1e-6,3e-6", "seed=1,2"], "exp")
    assert [(each.name, each.flags) for each in variants] == [
        ("exp.lr-1e-6_seed-1", {"lr": ["1e-6"], "seed": ["1"]}),
        ("exp.lr-1e-6_seed-2", {"lr": ["1e-6"], "seed": ["2"]}),
        ("exp.lr-3e-6_seed-1", {"lr": ["3e-6"], "seed": ["1"]}),
        ("exp.lr-3e-6_seed-2", {"lr": ["3e-6"], "seed": ["2"]}),
    ]
    assert str(variants[0]) == "--lr=1e-6 --seed=1"
    (on, off) = read_variants(["use_kl_loss=true,false"], "exp")
    assert on.flags == {"use-kl-loss": []} and off.flags == {"use-kl-loss": None}
    assert (on.name, off.name) == ("exp.use-kl-loss-true", "exp.use-kl-loss-false")


def test_runs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "variants.toml"
    path.write_text(
        '[[run]]\nname = "small"\nlr = 1e-6\n[[run]]\nlr = 1e-4\neval-prompt-data = ["dev", "/d.jsonl"]\n'
    )
    variants = read_variants([str(path), "seed=1,2"], "exp")
    assert [each.name for each in variants] == [
        "exp.small_seed-1", "exp.small_seed-2", "exp.2_seed-1", "exp.2_seed-2",
    ]  # fmt: skip
    assert variants[2].flags == {"lr": ["0.0001"], "eval-prompt-data": ["dev", "/d.jsonl"], "seed": ["1"]}


def test_names_that_can_not_be_are_numbers() -> None:
    paths = read_variants(["prompt-data=/a/b.jsonl,/a:b.jsonl"], "exp")  # the same to a file system
    assert [each.name for each in paths] == ["exp.001", "exp.002"]
    assert read_variants([f"note={'x' * 200}"], "exp")[0].name == "exp.001"
    assert read_variants(["prompt-data=/a/b.jsonl"], "exp")[0].name == "exp.prompt-data-a-b.jsonl"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], "FLAG=VALUE"),
        (["lr=1,,2"], "FLAG=VALUE"),
        (["nowhere.toml"], "No such file"),
        (["lr=1,2", "lr=3"], "--lr in more than one place"),
    ],
)
def test_words_that_make_no_sense(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_variants(words, "exp")


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    for text, message in [("lr = 1", "tables"), ("run = 3", "tables"), ("[[run", "not valid TOML")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_variants([str(path)], "exp")


FLAGS = [
    *("--hf-checkpoint=m", "--prompt-data=p", "--rollout-batch-size=16", "--num-rollout=5", "--name=exp"),
]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(inputs, "check_inputs", lambda args, to_come=None: args)
    monkeypatch.setattr(start_run.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["submit", *FLAGS, *words])
        return main()

    return call


def test_dry_run_shows_every_script(call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--sweep", "lr=1e-6,3e-6", "--partition=gpu", "--nodes=4", "--dry-run") == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("# exp.")] == [
        "# exp.lr-1e-6: --lr=1e-6", "# exp.lr-3e-6: --lr=3e-6",
    ]  # fmt: skip
    assert out.count("#!/bin/bash") == 2
    assert "--job-name=exp.lr-1e-6\n" in out and "--job-name=exp.lr-3e-6\n" in out
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "lrr=1,2"], "unknown flag --lrr: did you mean --lr"),
        (["--sweep", "rollout-batch-size=4,x"], "--rollout-batch-size"),
        (["--sweep", "lr=1", "--sweep-parallel=0"], "at least 1"),
        (["--sweep", "partition=gpu"], "no sbatch"),
    ],
)
def test_nothing_is_started_if_one_can_not_be(
    call, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_on_this_machine_one_after_the_other(job: Job) -> None:
    code, out, err = job.finish("--sweep", "seed=1,2", steps=2)
    assert (code, err) == (0, ASSUMED * 2)
    assert "2 runs:" in out and "hpc.status 'job.*' --runs-dir runs" in out
    layouts = choose_runs(["job.*"], job.layout.root.parent)
    assert sorted(layout.name for layout in layouts) == ["job.seed-1", "job.seed-2"]
    for layout in layouts:
        assert len(layout.metrics.read_text().splitlines()) == 2
    begun, ended = (
        [event["time"] for event in lines_of(layout.events)]
        for layout in sorted(layouts, key=lambda layout: layout.name)
    )
    assert max(begun) <= min(ended)
    again, out, _ = job.finish("--sweep", "seed=1,2,3", steps=2)
    assert again == 0 and out.count("has finished its 2 steps") == 2
