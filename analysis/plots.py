"""Pictures of a run: one function a view, each draws on the Axes it is given or a new one and returns it.

matplotlib is imported when the first picture is drawn. The colours are Okabe and Ito's, which people with
any common colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from analysis._plot_style import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, dress, metric, new_axes, smooth
from analysis._plots_policy import (
    entropy,
    grad_norm,
    pass_at_k,
    policy_kl,
    response_lengths,
    reward_bands,
    reward_curve,
    zero_std,
)
from analysis._plots_system import gpu_hours, logprob_gap, staleness, time_breakdown, token_gap

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis._run import Run

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


def comparison(runs: Iterable[Run], name: str = "rollout/reward", ax: Axes | None = None) -> Axes:
    """One metric of several runs, smoothed, the recorded values behind it."""
    ax = new_axes(ax)
    for run, colour in zip(runs, cycle([BLUE, ORANGE, GREEN, PINK, SKY, RED]), strict=False):
        values = metric(run.steps, name)
        ax.plot(values.index, values, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(values.index, smooth(values), color=colour, linewidth=2.2, label=run.name)
    return dress(ax, name, "step", name)


def dashboard(run: Run) -> Figure:
    """The most telling views on one page."""
    views = [reward_curve, reward_bands, pass_at_k, response_lengths, zero_std, entropy, logprob_gap, time_breakdown,
             gpu_hours]  # fmt: skip
    return _page(run, views, rows=3, size=(18, 12.5))


def overview(run: Run) -> Figure:
    """The four views that say at a glance whether a run learns and where its time goes."""
    return _page(run, [reward_curve, response_lengths, logprob_gap, time_breakdown], rows=2, size=(12, 8))


def _page(
    run: Run, views: Sequence[Callable[[Run, Axes | None], Axes]], *, rows: int, size: tuple[float, float]
) -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    margins = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.13)
    figure, axes = plt.subplots(rows, len(views) // rows, figsize=size, layout=margins)
    for view, ax in zip(views, axes.flat, strict=True):
        view(run, ax)
    figure.suptitle(run.name, x=0.01, ha="left", fontsize=17, fontweight="bold",
                    color=INK)  # fmt: skip
    return figure
