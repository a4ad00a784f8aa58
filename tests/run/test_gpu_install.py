"""The install of a GPU node: one line, and a lock that fits pyproject.toml, SGLang and each Python."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "gpu.txt"
LINE = "pip install -c requirements/gpu.txt '.[train,gpu]'"
PYTHONS = ("3.11", "3.12", "3.13")


def environment(python: str) -> dict[str, str]:
    """What markers see on a GPU node."""
    known = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    return {**default_environment(), **known, "sys_platform": "linux", "platform_machine": "x86_64"}  # type: ignore[dict-item]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment(python))


def locked(python: str) -> dict[str, str]:
    """The version of each package for a Python; each has one."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    found = [each for each in map(Requirement, lines) if applies(each, python)]
    versions = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in found}
    assert len(versions) == len(found)
    return versions


def misfits(requirements: list[str], python: str) -> list[str]:
    versions = locked(python)
    wanted = [each for each in map(Requirement, requirements) if applies(each, python)]
    found = [(str(each), each.specifier, versions.get(canonicalize_name(each.name))) for each in wanted]
    return [
        f"{text}: {version}"
        for text, specifier, version in found
        if version is None or not specifier.contains(version, prereleases=True)
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_fits_what_pyproject_wants(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert (
        misfits([*project["dependencies"], *(each for extra in extras.values() for each in extra)], python)
        == []
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_fits_what_the_engines_and_megatron_want(python: str) -> None:
    engines = [*(metadata.requires("sglang") or []), *(metadata.requires("sglang-router") or [])]
    assert misfits(engines, python) == []
    assert locked(python)["megatron-core"] == ("0.16.1" if python == "3.11" else "0.19.2")
    assert misfits(metadata.requires("megatron-core") or [], python) == []


def test_there_is_one_line_and_it_is_everywhere() -> None:
    for page in ("README.md", "docs/gpu.md", "requirements/gpu.txt"):
        assert LINE in (ROOT / page).read_text(), page
    for text in [
        (ROOT / "README.md").read_text(),
        *(page.read_text() for page in (ROOT / "docs").glob("*.md")),
    ]:
        assert not re.search(r"pip install[^`\n]*sglang==", text)


def find_python(version: str) -> str | None:
    """A Python that starts; pyenv's shims may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    code = f"import sys; raise SystemExit('%d.%d' % sys.version_info[:2] != '{version}')"
    for candidate in (path for each in candidates if (path := shutil.which(each))):
        if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
            return candidate
    return None


def dry_run(line: str, python: str, directory: Path) -> None:
    """Resolve a `pip install` line in a new environment; nothing is installed."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    words = shlex.split(line)
    assert words[:2] == ["pip", "install"]
    command = [directory / "bin/python", "-m", "pip", "install", "--dry-run", "--quiet", *words[2:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.resolving
@pytest.mark.slow
def test_the_line_resolves_on_the_oldest_python(tmp_path: Path) -> None:
    if (python := find_python("3.11")) is None:
        pytest.skip("there is no Python 3.11 on this machine")
    dry_run(LINE, python, tmp_path / "venv")


@pytest.mark.resolving
@pytest.mark.slow
def test_the_line_of_the_containers_resolves(tmp_path: Path) -> None:
    text = (ROOT / "containers/Dockerfile").read_text()
    [line] = re.findall(r"pip install .*\[train,gpu\]'", text)
    if (python := find_python("3.12")) is None:
        pytest.skip("there is no Python 3.12 on this machine")
    dry_run(line, python, tmp_path / "venv")


@pytest.mark.resolving
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="TransformerEngine is compiled with nvcc")
def test_transformer_engine_resolves_with_the_headers_of_the_wheels() -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "requirements/transformer-engine.sh", "--dry-run", "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_package_that_needs_a_driver_is_hidden_where_there_is_none(tmp_path: Path) -> None:
    """A fake flash_mla that raises what SGLang's does; the real one is in the environment of a GPU node."""
    (tmp_path / "flash_mla.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    code = (
        "import os\nfrom rltrain import packages\npackages.driver_cuda = lambda: {driver}\nimport rltrain.megatron\n"
        "print(os.environ.get('TORCHDYNAMO_DISABLE'))\nimport flash_mla"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    cases = (
        (None, None, "1", "ModuleNotFoundError"),
        ((13, 0), None, "None", "OSError"),
        (None, "0", "0", "Mod"),
    )
    for driver, given, compiles, error in cases:
        own = {name: value for name, value in env.items() if name != "TORCHDYNAMO_DISABLE"}
        own |= {} if given is None else {"TORCHDYNAMO_DISABLE": given}
        command = [sys.executable, "-c", code.format(driver=driver)]
        done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == compiles  # by torch, what Megatron-core marks for it
        assert done.stderr.splitlines()[-1].startswith(error), done.stderr


def test_transformer_engine_needs_a_compiler(tmp_path: Path) -> None:
    for name in ("sh", "dirname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    script = ROOT / "requirements/transformer-engine.sh"
    done = subprocess.run([script], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "nvcc is not on PATH" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"), [("/bin/sh", "/bin/sh is not a Python 3.12"), ("", "no Python 3.12 on")]
)
def test_without_python_3_12_it_is_said_how_to_get_one(given: str, said: str, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHON312": given}
    command = [str(shutil.which("sh")), ROOT / "requirements/python312.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr
    assert "make test-current PYTHON312=/path/to/python3.12" in done.stderr


def test_python_3_12_may_be_named(tmp_path: Path) -> None:
    """A fake interpreter that prints its path, as the real one does for the version that is asked for."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho /opt/python3.12\n")
    fake.chmod(0o755)
    command = [ROOT / "requirements/python312.sh"]
    done = subprocess.run(command, env={**os.environ, "PYTHON312": str(fake)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "/opt/python3.12\n")
