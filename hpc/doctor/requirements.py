"""Are Python, the packages and the driver installed, in the versions that this project needs?"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hpc.doctor.check import Check, fail, ok, warn
from rltrain import packages

_MIN_PYTHON = (3, 11)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """The interpreter."""
    text = ".".join(map(str, version))
    if version < _MIN_PYTHON:
        return fail("python", f"{text} at {sys.executable}", "Python 3.11 or newer is needed")
    return ok("python", f"{text} at {sys.executable}")


def check_packages(need_training: bool) -> list[Check]:
    """One check of what submitting needs, one of what the job's processes need.

    Args:
        need_training: whether the job will run with this very interpreter's packages, so that those must be here.
    """
    base, training = packages.requirements(""), packages.requirements("train", "gpu")
    if base is None or training is None:
        text = "slurmlime itself is not installed, so its requirements are not known"
        return [warn("packages", text, packages.install_command())]
    if packages.torch_cuda():  # on a CPU machine SGLang is installed without what it asks for
        training += packages.engine_requirements()
    checks = [_report("packages", base, need_training=True)]
    return [*checks, _report("training packages", training, need_training)]


def _report(name: str, wanted: list[str], need_training: bool) -> Check:
    problems = packages.misfits(wanted)
    if not problems:
        return ok(name, f"{len(wanted)} as required")
    level = fail if need_training else warn
    advice = f"in a checkout: {packages.install_command()}"
    return level(
        name, "; ".join(problems), advice if need_training else f"fine if only nodes have them; else {advice}"
    )


def check_gpu_software(gpus: int) -> list[Check]:
    """Whether this machine's driver fits torch, and what the trainer's kernels are, if it has GPUs.

    Args:
        gpus: the number of GPUs of this machine.
    """
    if not gpus:
        return []
    built_for, driver = packages.torch_cuda(), packages.driver_cuda()
    versions = [".".join(map(str, each)) if each else "none" for each in (driver, built_for)]
    checks = [ok("driver", f"of CUDA {versions[0]}; torch is built for {versions[1]}")]
    if built_for is None and packages.installed_version("torch"):
        checks = [fail("driver", "torch is built for CPUs", f"in a checkout: {packages.install_command()}")]
    elif problem := packages.driver_problem(built_for, driver):
        checks = [fail("driver", problem)]
    return [
        *checks,
        check_compiler(os.environ),
        check_transformer_engine(packages.installed_version("transformer-engine-torch")),
    ]


def check_compiler(env: Mapping[str, str]) -> Check:
    """Whether engines find nvcc, where SGLang looks for it: it compiles kernels when they are first used."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    place = Path(home, "bin/nvcc") if home else Path(on_path or "/usr/local/cuda/bin/nvcc")
    if place.is_file():
        return ok("nvcc", str(place))
    return warn(
        "nvcc",
        f"{place} is not there: engines compile kernels of SGLang with it",
        "load the site's module of CUDA 13.0, or set CUDA_HOME (docs/gpu.md); fine if only nodes have it",
    )


def check_transformer_engine(version: str | None) -> Check:
    """Whether the trainer has TransformerEngine's kernels; it works without them."""
    if version:
        return ok("TransformerEngine", version)
    text = "not installed: attention, norms and experts are slower, and there is no FP8"
    return warn("TransformerEngine", text, "requirements/transformer-engine.sh (docs/gpu.md)")
