"""Find out before submitting what would go wrong: packages, disk, network, Slurm, flags, input files, memory.

Takes the flags and recipes of `submit` and starts nothing but, with `--probe-nodes`, a job of a few seconds that
looks at the nodes. One line a check: ok, warn or FAIL, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc.doctor.check import Check
    from hpc.doctor.examine import doctor

__all__ = ["Check", "doctor"]


def __getattr__(name: str) -> Any:
    """The names that docs/cli.md gives. Only who asks for them imports what they need: planning, Slurm, submitting."""
    if name == "doctor":
        from hpc.doctor.examine import doctor

        return doctor
    if name == "Check":
        from hpc.doctor.check import Check

        return Check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
