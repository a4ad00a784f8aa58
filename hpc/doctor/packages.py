"""Are Python and the packages there, in the versions that this project asks for?"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from hpc.doctor.check import Check, fail, ok, warn

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<bounds>[^;]*)(?:;\s*(?P<marker>.*))?")
_BOUND = re.compile(r"(==|>=|<=|<|>|!=|~=)\s*([\w.*+-]+)")
# What the job's processes import beside the requirements of the package itself: see requirements/.
ENGINE_PACKAGES = ("sglang", "sglang-router")
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
    try:
        requirements = metadata.requires("slurmlime") or []
    except metadata.PackageNotFoundError:
        return [
            warn(
                "packages",
                "slurmlime itself is not installed, so its requirements are not known",
                "make setup",
            )
        ]
    base = [text for text in requirements if "extra ==" not in text]
    train = [text for text in requirements if re.search(r"extra == ['\"]train['\"]", text)]
    checks = [_report("packages", base, need_training=True)]
    return [*checks, _report("training packages", [*train, *ENGINE_PACKAGES], need_training)]


def _report(name: str, requirements: list[str], need_training: bool) -> Check:
    problems = [problem for text in requirements if (problem := problem_with(text, installed_version))]
    if not problems:
        return ok(name, f"{len(requirements)} as required")
    level = fail if need_training else warn
    advice = "install them (make setup)" if need_training else "fine on a login node if the nodes have them"
    return level(name, "; ".join(problems), advice)


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def problem_with(requirement: str, version_of: object) -> str | None:
    """What is wrong with an installed package, such as `torch 2.9.0 is not ==2.13.0`; None if nothing is."""
    match = _REQUIREMENT.match(requirement)
    assert match and callable(version_of)
    name, version = match["name"], version_of(match["name"])
    if version is None:
        return f"{name} is missing"
    if all(_holds(version, operator, bound) for operator, bound in _BOUND.findall(match["bounds"])):
        return None
    return f"{name} {version} is not {match['bounds'].strip()}"


def _holds(version: str, operator: str, bound: str) -> bool:
    have, want = release(version), release(bound)
    width = max(len(have), len(want))
    have, want = (number + (0,) * (width - len(number)) for number in (have, want))
    if operator == "~=":
        return have >= want and have[: len(release(bound)) - 1] == want[: len(release(bound)) - 1]
    return {
        "==": have == want, "!=": have != want, ">=": have >= want, "<=": have <= want, ">": have > want,
        "<": have < want,
    }[operator]  # fmt: skip


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version; what comes after them (`+cpu`, `rc1`) is left out."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
