"""Figures made of views: several views on one page, several runs in one view; and writing a figure to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from analysis.frames.run import RunFrames
from analysis.frames.steps import metric
from analysis.plots.policy import entropy, pass_at_k, response_lengths, reward_bands, reward_curve, zero_std
from analysis.plots.style import INK, distinct_colours, dress, new_axes, smooth
from analysis.plots.system import gpu_hours, logprob_gap, time_breakdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def comparison(runs: Iterable[RunFrames], name: str = "rollout/reward", ax: Axes | None = None) -> Axes:
    """One metric of several runs, smoothed, the recorded values behind it. Runs that lack it are named in the title."""
    ax = new_axes(ax)
    recorded = [(run.name, metric(run.steps, name)) for run in runs]
    there = [(run_name, values) for run_name, values in recorded if len(values)]
    for (run_name, values), colour in zip(there, distinct_colours(len(there)), strict=True):
        ax.plot(values.index, values, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(values.index, smooth(values), color=colour, linewidth=2.2, label=run_name)
    missing = [run_name for run_name, values in recorded if not len(values)]
    left_out = (
        f" (not recorded: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''})"
        if there and missing
        else ""
    )
    return dress(ax, name + left_out, "step", name)


def dashboard(run: RunFrames) -> Figure:
    """The most telling views on one page."""
    views = [reward_curve, reward_bands, pass_at_k, response_lengths, zero_std, entropy, logprob_gap, time_breakdown,
             gpu_hours]  # fmt: skip
    return _page(run, views, rows=3, size=(18, 12.5))


def overview(run: RunFrames) -> Figure:
    """The four views that say at a glance whether a run learns and where its time goes."""
    return _page(run, [reward_curve, response_lengths, logprob_gap, time_breakdown], rows=2, size=(12, 8))


def save_picture(
    draw: Callable[[RunFrames], Figure],
    run: RunFrames,
    target: Path | IO[bytes],
    *,
    dpi: int,
    file_format: str | None = None,
) -> None:
    """Write a figure of a run to a file, without a display. Its format follows from the file's name if not given."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(run)
    figure.savefig(target, dpi=dpi, format=file_format)
    plt.close(figure)


def _page(
    run: RunFrames,
    views: Sequence[Callable[[RunFrames, Axes | None], Axes]],
    *,
    rows: int,
    size: tuple[float, float],
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
