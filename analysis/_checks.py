"""What `Run.doctor` looks for: one small check each, which takes a run and returns a finding or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from analysis import _checks_policy as policy
from analysis import _checks_system as system
from analysis._findings import Finding, Findings

if TYPE_CHECKING:
    from analysis._run import Run

CHECKS: list[Callable[[Run], Finding | None]] = [
    policy.mismatch_drift,
    policy.reward_hacking,
    policy.entropy_collapse,
    policy.zero_std_groups,
    policy.truncation,
    policy.not_finite,
    system.failures,
    system.stale_weights,
    system.idle_roles,
    system.kl_spike_after_resume,
    system.steps_lost,
    system.failed_run,
]


def examine(run: Run) -> Findings:
    """Run every check."""
    return Findings(run.name, [finding for check in CHECKS if (finding := check(run)) is not None])
