"""The look that all views share: axes, legends, marks, and the colours of Okabe and Ito.

People with any common colour blindness can tell these colours apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.frames.run import RunFrames
from analysis.frames.steps import PHASES, resumed_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PINK, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
INK, MUTED, GRID = "#222222", "#767676", "#E6E6E6"
EVAL_COLOURS = [RED, GREEN, PINK, SKY, ORANGE]
PHASE_COLOURS = dict(zip([*PHASES, "other"], [BLUE, PINK, ORANGE, GREEN, SKY, "#BDBDBD"], strict=True))

_LEGEND_COLUMNS = 3
_LEGEND_CHARACTERS = 90  # in a row of a legend above the picture
_MOST_ABOVE = 9  # names in a legend above the picture
_LEGEND_ROWS = 24  # of one beside it


def distinct_colours(count: int) -> list[Any]:
    """As many colours, no two of them the same: those of Okabe and Ito while they last, else from dark to light."""
    own = [BLUE, ORANGE, GREEN, PINK, SKY, RED]
    if count <= len(own):
        return own[:count]
    from matplotlib import colormaps

    return list(colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def new_axes(ax: Axes | None) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def smooth(values: pd.Series) -> pd.Series:
    """A centred running mean over a fifteenth of the values; unchanged if there are fewer than 15."""
    window = max(3, len(values) // 15) if len(values) >= 15 else 1
    return values.rolling(window, center=True, min_periods=1).mean()


def length_limit(ax: Axes, run: RunFrames) -> None:
    """A line at `--rollout-max-response-len`, where it is near enough to be seen."""
    limit = run.config.get("train", {}).get("rollout_max_response_len")
    if limit and ax.dataLim.y1 > limit / 2:  # far away, it would only squeeze the curves
        ax.axhline(limit, color=RED, linewidth=1, linestyle="--")
        ax.annotate(f"limit: {limit} tokens", (1, limit), xycoords=("axes fraction", "data"), xytext=(-3, -4),
                    textcoords="offset points", ha="right", va="top", fontsize=9, color=RED)  # fmt: skip
        ax.set_ylim(top=limit * 1.12)


def attempt_marks(ax: Axes, steps: pd.DataFrame) -> None:
    """A thin line where a later attempt of the job took over."""
    for attempt, step in resumed_at(steps):
        ax.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0.5)
        ax.annotate(f"attempt {attempt}", (step, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                    textcoords="offset points", va="top", fontsize=8, color=MUTED)  # fmt: skip


def label_last(ax: Axes, x: float, y: float, colour: str) -> None:
    """The value of the last point, written above it."""
    ax.annotate(f"{y:.3g}", (x, y), xytext=(0, 7), textcoords="offset points",
                ha="center", fontsize=9, fontweight="bold", color=colour)  # fmt: skip


def whole_decades(ax: Axes) -> None:
    """A log scale from one power of ten to another: it needs no labels in between."""
    from matplotlib.ticker import NullFormatter

    values = np.concatenate([np.asarray(line.get_ydata(), dtype="float64") for line in ax.lines])
    positive = values[values > 0]
    if not len(positive):
        return
    ax.set_yscale("log", nonpositive="mask")
    ax.set_ylim(10 ** np.floor(np.log10(positive.min())), 10 ** np.ceil(np.log10(positive.max()) + 1e-9))
    ax.yaxis.set_minor_formatter(NullFormatter())


def dress(ax: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    """Title, labels, grid and legend; the legend stands between title and picture, where it hides no data."""
    from matplotlib.ticker import MaxNLocator

    labels = ax.get_legend_handles_labels()[1]
    is_long = len(labels) > _MOST_ABOVE
    longest = max(map(len, labels), default=0)
    columns = max(1, min(_LEGEND_COLUMNS, _LEGEND_CHARACTERS // (longest + 8)))
    legend_rows = 0 if is_long else -(-len(labels) // columns)
    pad = 10 + 16 * legend_rows  # points
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad)
    ax.set_xlabel(xlabel, color=MUTED)
    ax.set_ylabel(ylabel, color=MUTED)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(which="both", colors=MUTED, labelsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    if is_long:  # beside the picture
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), ncols=-(-len(labels) // _LEGEND_ROWS),
                  frameon=False, fontsize=7, labelcolor=INK)  # fmt: skip
    elif labels:
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns,
                  frameon=False, fontsize=9, labelcolor=INK)  # fmt: skip
    elif not ax.has_data():
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", color=MUTED)
    return ax
