"""The images under containers/: what a linter would say, the interpreter for Apptainer, and the recipes of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hpc.planning import slurm_tables
from rltrain.arguments.recipes import read_recipe

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "containers/Dockerfile").read_text()
DEFINITION = (ROOT / "containers/slurmlime.def").read_text()
PYTHON = ROOT / "containers/apptainer-python"


def sections() -> dict[str, str]:
    """The sections of the Apptainer definition by name."""
    parts = re.split(r"^%(\w+)\n", DEFINITION, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_both_images_are_made_of_the_same_things() -> None:
    for pattern in (
        r"nvidia/cuda:\S+",
        r"apt-get install [^\\\n]*\w",
        r"pip install .*\]'",
        r"requirements/transformer-engine.sh.*?;",
    ):
        found = [re.findall(pattern, text) for text in (DOCKERFILE, DEFINITION)]
        assert found[0] == found[1] and len(found[0]) == 1, pattern


def test_no_moving_tag_and_no_cache_is_left_in_an_image() -> None:
    for text in (DOCKERFILE, DEFINITION):
        [tag] = re.findall(r"nvidia/cuda:(\S+)", text)
        assert re.match(r"\d+\.\d+\.\d+-", tag)
        assert all("--no-cache-dir" in line for line in re.findall(r"(?:pip install|engine.sh) .*", text))
        assert "rm -rf /var/lib/apt/lists/*" in text
        assert "sudo" not in text and "curl" not in text


def test_one_layer_has_one_topic() -> None:
    steps = re.findall(r"^RUN (?:.*\\\n)*.*", DOCKERFILE, flags=re.MULTILINE)
    topics = [
        [word for word in ("apt-get", "-m venv", "pip install", "engine.sh") if word in step]
        for step in steps
    ]
    assert topics == [["apt-get"], ["-m venv"], ["pip install"], ["engine.sh"]]


def test_the_dockerfile_is_clean_to_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (make lint runs it)")
    done = subprocess.run([hadolint, ROOT / "containers/Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_definition_copies_the_packages_and_is_a_shell_script(tmp_path: Path) -> None:
    found = sections()
    copied = {line.split()[0] for line in found["files"].splitlines() if line.strip()}
    assert all((ROOT / path).exists() for path in copied)
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]
    assert {name.removesuffix("*") for name in include} <= copied
    for name in ("post", "environment", "test"):
        subprocess.run(["sh", "-n"], input=found[name], text=True, check=True)


@pytest.fixture
def apptainer(tmp_path: Path) -> dict[str, str]:
    """A fake apptainer that writes down its words and starts the command, as if inside; and the environment for it."""
    (tmp_path / "apptainer").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwhile [ "$1" != python ]; do shift; done\n'
        'APPTAINER_CONTAINER=x exec "$@"\n'
    )
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURMLIME", "APPTAINER"))
    }
    return {**env, "PATH": f"{tmp_path}:{env['PATH']}"}


def test_a_role_enters_the_image_once(apptainer: dict[str, str], tmp_path: Path) -> None:
    """As a job does it: the task inside becomes the role, with the same interpreter."""
    code = f"import os; os.execvp('{PYTHON}', ['{PYTHON}', '-c', 'print(1 + 1)'])"
    env = {**apptainer, "SLURMLIME_IMAGE": "/images/slurmlime.sif", "SLURMLIME_BIND": "/shared,/data"}
    done = subprocess.run([PYTHON, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("exec --nv --bind /shared,/data /images/slurmlime.sif python -c import os")


def test_without_an_image_it_is_said_what_is_missing(apptainer: dict[str, str]) -> None:
    done = subprocess.run([PYTHON, "-c", "pass"], env=apptainer, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SLURMLIME_IMAGE is not set: name the image in [slurm.env] of the recipe" in done.stderr


def test_the_recipes_of_the_page_are_recipes(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/containers.md").read_text(), flags=re.DOTALL)
    tables = []
    for block in blocks:
        (tmp_path / "container.toml").write_text(block)
        tables.append(slurm_tables.read(read_recipe(str(tmp_path / "container.toml"), [])))
    pyxis, apptainer = tables
    assert pyxis.python == "/opt/slurmlime/bin/python" and pyxis.srun["container-mounts"] == "/shared:/shared"
    assert apptainer.python == "/shared/bin/apptainer-python"
    assert set(apptainer.env) == set(re.findall(r"SLURMLIME_[A-Z]+", PYTHON.read_text()))
