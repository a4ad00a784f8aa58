"""Do the installed packages fit: this project's ranges, what SGLang asks for beside them, and the driver of the GPUs?

Reads the packages' metadata and imports none of them.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from rltrain.run.errors import UserError

# What SGLang pins, and a CPU machine has otherwise (see requirements/): its kernels are compiled against it.
_PINNED_BY_ENGINE = ("torch", "transformers")
_INSTALL_GPU = "pip install -c requirements/gpu.txt '.[train,gpu]'"
_INSTALL_CPU = "make setup"


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements(*extras: str) -> list[str] | None:
    """This project's requirements: of every install (extra ``""``) or of optional parts; None if not installed."""
    try:
        declared = metadata.requires("slurmlime") or []
    except metadata.PackageNotFoundError:
        return None
    return [text for text in declared if any(_applies(text, extra) for extra in extras)]


def _applies(requirement: str, extra: str) -> bool:
    """Whether a requirement holds on this machine for the optional packages `extra` alone."""
    marker = Requirement(requirement).marker
    if marker is None or "extra" not in str(marker):
        return extra == "" and (marker is None or marker.evaluate())
    return extra != "" and marker.evaluate({"extra": extra})


def engine_requirements() -> list[str]:
    """What the installed SGLang asks of the packages that the trainer uses too."""
    try:
        declared = metadata.requires("sglang") or []
    except metadata.PackageNotFoundError:
        return []
    return [text for text in declared if Requirement(text).name in _PINNED_BY_ENGINE and _applies(text, "")]


def misfits(wanted: Iterable[str]) -> list[str]:
    """The problems of installed packages, such as `torch 2.9.0 is installed, ==2.13.0 is needed`."""
    return [problem for text in wanted if (problem := problem_with(text, installed_version))]


def problem_with(requirement: str, version_of: Callable[[str], str | None]) -> str | None:
    """The problem with one package; None if it fits."""
    wanted = Requirement(requirement)
    version = version_of(wanted.name)
    needed = f"{wanted.specifier} is needed" if wanted.specifier else "any version is needed"
    if version is None:
        return f"{wanted.name} is not installed, {needed}"
    if wanted.specifier.contains(version, prereleases=True):
        return None
    return f"{wanted.name} {version} is installed, {needed}"


def check_trainer() -> None:
    """Before a trainer starts: its packages and the driver.

    Raises:
        UserError: they do not fit; the message has the command that mends it.
    """
    if problems := misfits(requirements("train") or []):
        raise UserError(f"{'; '.join(problems)}. In a checkout of slurmlime: {install_command()}")
    if problem := driver_problem(torch_cuda(), driver_cuda()):
        raise UserError(problem)


def install_command() -> str:
    """The command that installs versions that fit, for a machine as this one."""
    return _INSTALL_GPU if torch_cuda() or driver_cuda() else _INSTALL_CPU


def torch_cuda() -> tuple[int, int] | None:
    """The version of CUDA that torch is built for; None if it is built for CPUs, or not installed."""
    path = Path(sysconfig.get_path("purelib")) / "torch" / "version.py"
    try:
        found = re.search(r"^cuda\b.*= *'(\d+)\.(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that this machine's driver can run; None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10


def hide_kernels_that_need_a_driver() -> None:
    """Without a driver, `import flash_mla` becomes an ImportError. Call before Megatron-core is imported.

    SGLang's package of this name loads libcuda at once and raises an OSError, which Megatron-core (0.17 and later) does
    not expect; without the package it does without.
    """
    if driver_cuda() is None:
        sys.modules.setdefault("flash_mla", None)  # type: ignore[arg-type]


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within, to import them is an ImportError, unless they were imported before; for libraries that look for them."""
    new = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in new:
            del sys.modules[name]


@contextmanager
def quick_distributions() -> Iterator[None]:
    """Within, `importlib.metadata.packages_distributions` is quick. transformers calls it when it is imported.

    From Python 3.12 on the standard library makes a path of every file of every package and looks whether it is there:
    for the 100,000 files of a GPU node's environment a third of the time that an engine imports, on a local disk.
    """
    given = metadata.packages_distributions
    if sys.version_info >= (3, 12):
        metadata.packages_distributions = _packages_distributions
    try:
        yield
    finally:
        metadata.packages_distributions = given


def _packages_distributions() -> dict[str, list[str]]:
    """Distributions by what can be imported of them, as their lists of files say."""
    found: dict[str, list[str]] = {}
    for each in metadata.distributions():
        declared = (each.read_text("top_level.txt") or "").split()
        if names := declared or _top_level(each.read_text("RECORD") or ""):
            name = each.metadata["Name"]
            for top in names:
                found.setdefault(top, []).append(name)
    return found


def _top_level(record: str) -> set[str]:
    tops = set()
    for line in record.splitlines():
        first, slash, _ = line.partition(",")[0].partition("/")
        name = first if slash else inspect.getmodulename(first)
        if name and "." not in name:
            tops.add(name)
    return tops


def compile_nothing_without_a_driver() -> None:
    """Without a driver, torch.compile leaves functions as they are, unless TORCHDYNAMO_DISABLE says otherwise.

    Megatron-core has parts of its experts compiled: a C++ compiler would run for seconds in every process, and to load
    torch's own takes a fifth of a rank's start. For roles only: a job inherits the environment of who submits it, from
    a login node without a driver.
    """
    if driver_cuda() is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def driver_problem(built_for: tuple[int, int] | None, driver: tuple[int, int] | None) -> str | None:
    """Why torch would see no GPU, and so compute on the CPU; None if it would, or if there is none.

    Within one major version of CUDA every driver runs every build.
    """
    if built_for is None or driver is None or built_for[0] <= driver[0]:
        return None
    build, runs = (".".join(map(str, version)) for version in (built_for, driver))
    return (
        f"torch is built for CUDA {build}, but this node's driver supports CUDA {runs} at most, so its GPUs can't be"
        f" used. Use a node whose driver has CUDA {built_for[0]} (nvidia-smi shows it), or have the site install one,"
        f" or NVIDIA's package cuda-compat-{built_for[0]}-{built_for[1]} with its folder on LD_LIBRARY_PATH."
    )
