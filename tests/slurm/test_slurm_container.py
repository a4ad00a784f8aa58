"""Container flags on a real Slurm, with a stand-in for the pyxis plugin (tests/fakes/pyxis.c)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm_fixture import until, wait_for
from helpers.slurm_job import FakeRun

from hpc.planning.script import BatchScript
from hpc.sandbox import Sandbox
from hpc.slurm.states import JobState
from hpc.submitting.executor import check_script

pytestmark = pytest.mark.slurm

SOURCE = Path(__file__).parents[1] / "fakes" / "pyxis.c"
IMAGE, MOUNTS = "nvcr.io#nvidia/pytorch:25.01-py3", "/shared:/shared,/data:/data:ro"


@pytest.fixture
def pyxis(slurm_cluster: Sandbox, tmp_path: Path) -> Iterator[None]:
    """The plugin, as a site's administrator installs it."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler (Debian: gcc), so the stand-in for pyxis can't be built")
    plugin = Path(slurm_cluster.env["SLURM_CONF"]).with_name("fake_pyxis.so")
    numbers = re.findall(r"\d+", slurm_cluster.run("sinfo", "--version"))
    major, minor, micro = (int(number) for number in numbers[:3])
    version = f"-DSLURM_VERSION={major << 16 | minor << 8 | micro}"
    subprocess.run([compiler, "-shared", "-fPIC", version, "-o", str(plugin), str(SOURCE)], check=True)
    stack = plugin.with_name("plugstack.conf")
    stack.write_text(f"required {plugin}\n")
    yield
    stack.unlink()
    plugin.unlink()


def test_roles_start_in_the_container_and_the_supervisor_does_not(run: FakeRun, pyxis: None) -> None:
    flags = (f"--slurm.srun.container-image={IMAGE}", f"--slurm.srun.container-mounts={MOUNTS}")
    job = run.detach("--nodes=4", *flags, steps=1000)
    until(lambda: run.steps(), 120, "the first step")
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = [word.decode(errors="replace") for word in path.read_bytes().split(b"\0") if b"=" in word]
            name = (path.parent / "comm").read_text().strip()
        except OSError:
            continue
        variables = dict(word.split("=", 1) for word in words)
        is_task = "SLURMLIME_ROLE" in variables and name != "srun"
        if is_task and variables.get("SLURMLIME_RUN_DIR") == str(run.layout.root):
            found[variables["SLURMLIME_ROLE"]] = variables
    assert set(found) == {"router", "engine", "rollout", "trainer"}
    for variables in found.values():
        assert (variables["FAKE_PYXIS_IMAGE"], variables["FAKE_PYXIS_MOUNTS"]) == (IMAGE, MOUNTS)
    script = run.layout.script.read_text()
    assert "container" not in script  # of the steps, not of the job
    job.cancel()
    wait_for(run.cluster, job.job_id)


def test_sbatch_takes_them_too(slurm_cluster: Sandbox, pyxis: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.env["SLURM_CONF"])
    flags = {"partition": "gpu", "container-image": IMAGE, "container-mounts": MOUNTS}
    assert "to start at" in check_script(BatchScript((flags,), "true").text())


def test_without_the_plugin_srun_says_so(run: FakeRun) -> None:
    code, _, err = run.finish("--nodes=4", f"--slurm.srun.container-image={IMAGE}")
    assert code == 1 and "unrecognized option '--container-image" in err, err
    assert wait_for(run.cluster, run.entries()[-1]["job_id"]).state is JobState.FAILED
