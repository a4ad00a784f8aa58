"""Pictures of a run: one function a view. Each draws on the Axes that it is given, or on new ones, and returns them.

matplotlib is imported when the first picture is drawn.
"""

from analysis.plots.figures import comparison, dashboard, overview
from analysis.plots.policy import (
    entropy,
    grad_norm,
    pass_at_k,
    policy_kl,
    response_lengths,
    reward_bands,
    reward_curve,
    zero_std,
)
from analysis.plots.system import gpu_hours, logprob_gap, staleness, time_breakdown, token_gap

__all__ = [
    "comparison",
    "dashboard",
    "entropy",
    "gpu_hours",
    "grad_norm",
    "logprob_gap",
    "overview",
    "pass_at_k",
    "policy_kl",
    "response_lengths",
    "reward_bands",
    "reward_curve",
    "staleness",
    "time_breakdown",
    "token_gap",
    "zero_std",
]
