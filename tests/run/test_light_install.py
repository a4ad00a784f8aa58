"""`pip install .` alone, as on a login node: no torch, no SGLang, and still plan, check and read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = """
import importlib.util, sys
heavy = ["torch", "megatron", "sglang", "sglang_router", "transformers", "wandb"]
assert not [name for name in heavy if importlib.util.find_spec(name)]
import analysis, hpc
print(analysis.__file__)
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new virtual environment with nothing but `pip install .` in it."""
    directory = tmp_path_factory.mktemp("light")
    source = directory / "source"  # a copy: building leaves files behind
    patterns = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")

    def ignore(folder: str, names: list[str]) -> set[str]:
        here = {"runs", "build"} if Path(folder) == ROOT else set()  # what runs and builds leave behind
        return patterns(folder, names) | here

    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True)
    python = directory / "venv" / "bin" / "python"
    # What is not imported need not be compiled.
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-compile"]
    subprocess.run([*install, "-c", ROOT / "requirements/constraints.txt", source], check=True)
    return python


def run(python: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_submit_and_analysis_work_without_torch(light: Path, tmp_path: Path) -> None:
    assert "site-packages" in run(light, "-c", PROBE, cwd=tmp_path)
    assert "--rollout-batch-size" in run(light, "-m", "hpc.submit", "--help", cwd=tmp_path)
    assert "hpc.submit" in run(light, "-m", "hpc", cwd=tmp_path)

    run(light, "-m", "rltrain.demo.assets", "demo", cwd=tmp_path)
    flags = ["--hf-checkpoint", "demo/model", "--random-init", "--prompt-data", "demo/train.jsonl"]
    evaluation = ["--eval-prompt-data", "addition", "demo/eval.jsonl"]
    planned = run(light, "-m", "hpc.submit", "@demo", *flags, *evaluation, "--dry-run", cwd=tmp_path)
    assert "rltrain.train" in planned
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_built_package_carries_its_data_files(light: Path, tmp_path: Path) -> None:
    listing = "import hpc, pathlib; print(pathlib.Path(hpc.__file__).parent.parent)"
    installed = Path(run(light, "-c", listing, cwd=tmp_path).strip())
    for package in ("hpc", "rltrain", "analysis", "slurm_templates"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in {".py", ".toml", ".txt", ".j2", ".ipynb", ".conf"}:
                assert (installed / path.relative_to(ROOT)).is_file(), path
