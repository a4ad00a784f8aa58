"""The list of checks: each is a small function that takes a run and returns a finding or None."""

from __future__ import annotations

from collections.abc import Callable

from analysis.checks import policy, system
from analysis.checks.findings import Finding, Findings
from analysis.frames.run import RunFrames

CHECKS: list[Callable[[RunFrames], Finding | None]] = [
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
    system.checkpoints_lost,
    system.failed_run,
]


def examine(run: RunFrames) -> Findings:
    """The findings of all checks of a run, the worst first."""
    return Findings(run.name, [finding for check in CHECKS if (finding := check(run)) is not None])
