"""`python -m hpc.doctor` as a person runs it: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.run_files import make_run

from hpc.doctor.__main__ import main
from hpc.doctor.examine import doctor


def run_doctor(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hpc.doctor", *words]
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=300)


def test_command_line_with_nothing(tmp_path: Path) -> None:
    done = run_doctor(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["CHECK", "WHAT"]
    assert all(line.split()[0] in ("ok", "warn") for line in lines[1:-1])
    assert "built-in demo" in done.stdout and lines[-1].endswith("0 that would fail")
    assert list(tmp_path.iterdir()) == []


def test_command_line_with_a_run_that_is_fine(
    tmp_path: Path,
    tiny_tokenizer: Path,
    prompt_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    flags = (
        f"--hf-checkpoint={tiny_tokenizer} --random-init --prompt-data={prompt_file} --label-key=label --rm-type=exact"
        " --num-rollout=2 --rollout-batch-size=4 --n-samples-per-prompt=2 --save-interval=1 --json"
    )
    code = main(flags.split())
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert code == 0, checks
    assert checks["flags"]["message"] == "4 prompts × 2 samples = 1 optimizer step(s) of 8"
    assert checks["input files"]["level"] == "ok"
    assert "trainer rank: weights" in checks["memory"]["message"]
    assert checks["model"]["message"] == "transformers reads the same model from its config.json"

    config = json.loads((tiny_tokenizer / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(tiny_tokenizer, other)
    (other / "config.json").write_text(json.dumps(config | {"initializer_range": "wide"}))
    code = main(flags.replace(str(tiny_tokenizer), str(other)).split())
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert code == 1 and checks["model"]["level"] == "fail"
    assert re.search(r"transformers 5\S+ can't use .*config\.json", checks["model"]["message"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rollout-bach-size=3"], "FAIL flags.*did you mean --rollout-batch-size"),
        (["--rollout-batch-size=3", "--num-rollout=1"], "FAIL flags.*missing --hf-checkpoint"),
        (["--nodes=4"], "FAIL flags.*--nodes: only for a job on Slurm"),
        (["--partition=gpu"], "FAIL slurm.*not on PATH"),
        (
            [*["--hf-checkpoint=/nowhere", "--prompt-data=/x", "--num-rollout=1", "--rollout-batch-size=2"]],
            "FAIL input files.*/nowhere: there is no such directory",
        ),
    ],
)
def test_what_would_fail_is_one_line_and_exit_code_1(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    code, (out, err) = main(words), capsys.readouterr()
    assert (code, err) == (1, "")
    lines = [" ".join(line.split()) for line in out.splitlines() if line.startswith("FAIL")]
    assert any(re.search(said, line) for line in lines)


def test_a_run_that_exists_is_checked_with_its_flags(tmp_path: Path) -> None:
    layout = make_run(tmp_path, "x")
    layout.config.write_text('[flags]\nhf-checkpoint = "/gone"\nprompt-data = "/x"\nnum-rollout = 1\n'
                             "rollout-batch-size = 2\n[train]\n")  # fmt: skip
    found = {check.name: check for check in doctor(["--name=x", f"--runs-dir={tmp_path}"])}
    assert "/gone" in found["input files"].message


def test_nodes_without_a_partition(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor([f"--runs-dir={tmp_path}"], probe_nodes=True)}
    assert found["nodes"].level == "warn"
