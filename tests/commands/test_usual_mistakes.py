"""What people usually get wrong in the flags: a file for a directory, a model's id, a table, a missing package."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpc import submit
from hpc.doctor import examine
from hpc.doctor.storage import check_storage
from hpc.planning.request import SubmitOptions
from hpc.slurm.client import JobStatus, SlurmUnavailableError
from hpc.slurm.states import JobState
from hpc.submitting import resuming, run_dir, slurm_job, start_run
from hpc.submitting.command_line import read_request
from rltrain import arguments
from rltrain.arguments import flags
from rltrain.arguments.config import Config
from rltrain.arguments.recipes import read_recipe
from rltrain.data.prompt_file import Prompt, PromptFile
from rltrain.inputs import check_imports, check_inputs
from rltrain.run.errors import UserError, run_main
from rltrain.run.finished import asked_steps
from rltrain.run.layout import RunLayout


@pytest.fixture
def place(demo_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a model, prompts, a file and a folder of no use."""
    shutil.copytree(demo_assets, tmp_path / "demo")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def words(*more: str, model: str = "demo/model", prompts: str = "demo/train.jsonl") -> list[str]:
    return [
        *("--hf-checkpoint", model, "--prompt-data", prompts, "--label-key", "label", "--rm-type", "exact"),
        *("--rollout-batch-size", "4", "--num-rollout", "3", "--random-init", *more),
    ]


def parse(*more: str, **places: str) -> Config:
    return arguments.parse(words(*more, **places))


DIRECTORIES = ("hf-checkpoint", "load", "ref-load", "save", "save-hf")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *((f"--{name} file", "it is a file where a directory is needed") for name in DIRECTORIES),
        ("--save file/checkpoints", "/file is a file where a directory is needed"),
        ("--wandb-dir file", "it is a file where a directory is needed"),
        ("--custom-config-path folder", "it is a directory; give the file in it"),
        ("--custom-config-path nowhere.toml", "there is no such file"),
        ("--eval-config folder", "it is a directory; give the file in it"),
        ("--sglang-config folder", "it is a directory; give the file in it"),
        ("--eval-prompt-data held-out folder", "it is a directory"),
        ("--prompt-data folder", "it is a directory"),
    ],
)  # fmt: skip
def test_a_file_for_a_directory_and_the_other_way_round(place: Path, given: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_inputs(parse(*given.split()))
    flag, *_, name = given.split()
    assert said in str(caught.value) and name in str(caught.value)
    assert flag in str(caught.value) or "prompt file" in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_a_recipe_and_a_place_for_runs_of_the_wrong_kind(place: Path) -> None:
    with pytest.raises(UserError, match=r"@folder: it is a directory; give the recipe in it"):
        read_recipe("folder", [])
    (check,) = check_storage(place / "file" / "runs", others=False)
    assert check.level == "fail" and f"{place}/file is a file" in check.message


def test_a_models_id_is_found_in_the_cache_or_told_how_to_get_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    with pytest.raises(UserError, match=r"`hf download Qwen/Qwen3-0.6B` downloads it into the local cache"):
        check_inputs(parse(model="Qwen/Qwen3-0.6B"))
    kept = place / "cache" / "models--Qwen--Qwen3-0.6B"
    shutil.copytree("demo/model", kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    config = check_inputs(parse(model="Qwen/Qwen3-0.6B"))
    assert config.model.hf_checkpoint == str(kept / "snapshots" / "abc")
    assert parse().model.hf_checkpoint == str(place / "demo" / "model")  # a directory comes first
    for wrong in ("../modle", "a--b/c", "/models/Qwen3-4B"):  # no names of the Hub
        with pytest.raises(UserError, match=r"there is no such directory\.( If a--b/c|$)"):
            check_inputs(parse(model=wrong))
    assert resuming._is_same([config.model.hf_checkpoint], ["Qwen/Qwen3-0.6B"])


@pytest.mark.parametrize(
    "given",
    [
        ["--test-only"],
        ["--nodes", "4", "--time=2:00:00", "--detach"],
        ["--slurm.sbatch.constraint=ib"],
        ["--account", "me", "--sweep", "lr=1e-5,1e-6"],
    ],
)
def test_options_of_a_slurm_job_without_a_partition(
    place: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    """They must not start the run here, where a person expects a job, or just a check."""
    monkeypatch.setattr(submit, "submit_run", lambda *_: pytest.fail("the run was started"))
    with pytest.raises(
        UserError, match=rf"{given[0].partition('=')[0]}.*only for a job on Slurm.*--partition"
    ):
        submit.submit([*words(), "--runs-dir", "runs", *given])
    assert not (place / "runs").exists()


def test_a_recipe_for_slurm_runs_here_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "submit_run", lambda *_: 0)
    (place / "cluster.toml").write_text('time = "2:00:00"\n[slurm.sbatch]\nconstraint = "ib"\n')
    assert submit.submit(["@cluster.toml", *words(), "--runs-dir", "runs"]) == 0


def test_epochs_are_rollouts_wherever_the_run_starts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = flags.split(words("--num-epoch", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "512"))[
        1
    ]
    del given["num-rollout"]
    seen = []
    monkeypatch.setattr(
        start_run, "_run_here", lambda _, rollout, plan: seen.append(rollout.num_rollout) or 0
    )
    options = SubmitOptions(runs_dir=place / "runs", name="x")
    assert start_run.submit_run(options, given) == 0
    recorded = {name: values for name, values in given.items() if name != "prompt-data"}
    with pytest.raises(UserError, match=r"--load-debug-rollout-data: .*Give --num-rollout, not --num-epoch"):
        start_run.submit_run(options, {**recorded, "load-debug-rollout-data": ["x_{rollout_id}.parquet"]})
    monkeypatch.setattr(slurm_job.shutil, "which", lambda _: None)
    job = slurm_job.plan_job(replace(options, partition="gpu", nodes=2, dry_run=True), given)
    assert [*seen, job.config.rollout.num_rollout, asked_steps(options.layout)] == [2 * 4600 // 4] * 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.toml", b"lr = 1e-3\n# caf\xe9\n", r"latin.toml, line 2: it is not text in UTF-8"),
        ("recpie.toml", None, r"@recpie.toml: there is no such file.*; near are @recipe.toml"),
        ("xyz", None, r"@xyz: there is no such file, and no such built-in recipe; --help lists those"),
        ("qwen3-4b", None, r"near are @qwen3-4B"),
    ],
)
def test_a_recipe_that_is_not_there_or_not_text(
    place: Path, name: str, content: bytes | None, said: str
) -> None:
    (place / "recipe.toml").write_bytes(b"\xef\xbb\xbflr = 1e-3\n")
    if content is not None:
        (place / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_recipe(name, [])
    assert read_recipe("recipe.toml", []) == {"lr": ["0.001"]}  # a byte order mark, as some editors write it


def test_a_run_whose_configuration_is_damaged(place: Path) -> None:
    (place / "runs" / "x").mkdir(parents=True)
    (place / "runs" / "x" / "config.toml").write_text('[flags]\nlr = "1e')
    with pytest.raises(UserError, match=r"x/config.toml can't be read.*another --name"):
        submit.submit([*words(), "--name", "x", "--runs-dir", "runs"])
    (place / "runs" / "x" / "config.toml").write_text("[train]\n")
    with pytest.raises(UserError, match=r"it has no table \[flags\]\.$"):
        run_dir.stored_flags(RunLayout(place / "runs" / "x"))


def test_a_run_whose_job_waits_does_not_begin_here_as_well(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeSlurm:
        def squeue(self, jobs: list[str]) -> list[JobStatus]:
            return [JobStatus(job, JobState.PENDING, ()) for job in jobs]

    monkeypatch.setattr(start_run, "_run_here", lambda *_: 0)
    given = flags.split(words())[1]
    options = SubmitOptions(runs_dir=place / "runs", name="x")
    assert start_run.submit_run(options, given) == 0
    run_dir.append_submission(options.layout, {"job_id": "8", "layout": "het"})
    monkeypatch.setattr(slurm_job, "SlurmClient", FakeSlurm)
    monkeypatch.setattr("hpc.submitting.executor.end_lost_jobs", lambda _: [])
    with pytest.raises(UserError, match=r"the run x has job 8, which is PENDING\. .*hpc\.cancel x"):
        start_run.submit_run(options, given)

    def silent(self: FakeSlurm, jobs: list[str]) -> list[JobStatus]:
        raise SlurmUnavailableError("squeue: no answer")

    monkeypatch.setattr(FakeSlurm, "squeue", silent)
    with pytest.raises(
        UserError, match=r"x may have a job .*, 8, and Slurm can't be asked: squeue: no answer"
    ):
        start_run.submit_run(options, given)


TABLE = '\ufeffinput,label,metadata\r\n1+1=,2,"{""a"": 1}"\r\n\r\n"two\nlines, and ""more""",042,\r\né,x,\r\n'


def test_a_table_of_prompts(place: Path) -> None:
    (place / "p.csv").write_bytes(TABLE.encode())
    expected = [Prompt("1+1=", "2", {"a": 1}), Prompt('two\nlines, and "more"', "042"), Prompt("é", "x")]
    prompts = PromptFile("p.csv", "input", "label")
    assert list(prompts) == expected and [prompts[i] for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    assert list(PromptFile("p.csv@[1:2]", "input", "label")) == expected[1:2]
    check_inputs(parse("--rollout-batch-size", "3", prompts="p.csv"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,label\nx,y\n", "p.csv, row 1: no key 'input'; the keys of this line are 'question', 'label'"),
        ("input,label\nx,y\nx\n", "p.csv, row 2: it has 1 values, and the first row names 2 columns"),
        ('input,label\n"x,y\n', "p.csv: not CSV in UTF-8 (unexpected end of data)"),
        ("input,label\n", "no prompts in it"),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong(place: Path, text: str, said: str) -> None:
    (place / "p.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        list(PromptFile("p.csv", "input", "label"))
    assert said in str(caught.value)


def test_prompts_that_one_may_not_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and no second error of a file that was never opened."""
    unheard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    monkeypatch.setattr(os, "open", lambda path, *_: _raise(PermissionError(13, "no", str(path))))
    assert run_main(lambda: _nothing(check_inputs(parse()))) == 2
    assert capsys.readouterr().err.startswith(f"error: {place}/demo/train.jsonl: you may not read")
    assert unheard == []


def _raise(error: Exception) -> int:
    raise error


def _nothing(_: object) -> None:
    return None


REWARD = """import json
import beside_it
try:
    import fast_package_that_may_be_missing
except ImportError:
    pass

def reward(args, sample):
    return 1.0
"""


@pytest.mark.slow
def test_a_package_that_a_reward_imports_and_nobody_has(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "odd_reward.py").write_text(REWARD)
    (place / "beside_it.py").write_text("import json\nfrom nobodys_package.part import thing\n")
    given = words("--custom-rm-path", "odd_reward.reward")
    config = arguments.parse(given)
    said = r"--custom-rm-path odd_reward.reward: beside_it.py:2 imports nobodys_package.part, which is not installed in"
    with pytest.raises(UserError, match=said):
        check_imports(config)
    assert "nobodys_package" not in sys.modules and "odd_reward" not in sys.modules  # nothing was run
    monkeypatch.setattr(examine, "_check_model", lambda _: [])  # imports transformers
    checks = {check.name: check for check in examine.check_flags(read_request(given))[1]}
    assert checks["imports"].level == "fail" and "nobodys_package" in checks["imports"].message
    options = SubmitOptions(runs_dir=place / "runs", name="x", dry_run=True)
    with pytest.raises(UserError, match="nobodys_package"):
        start_run.submit_run(options, flags.split(given)[1])
    (place / "beside_it.py").write_text("import numpy\n")
    check_imports(config)
    (place / "beside_it.py").write_text("import sys\nsys.path.insert(0, '/elsewhere')\nimport of_elsewhere\n")
    check_imports(config)
