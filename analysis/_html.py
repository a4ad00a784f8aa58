"""Pages to read samples in: one file that needs nothing else, neither network nor this package."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from analysis import _report_data as data
from analysis._progress import progress
from analysis._run import Run

_SCRIPTS = ["data.js", "charts.js", "detail.js", "list.js", "main.js"]


@dataclass(frozen=True)
class Html:
    """A page: shows itself in a notebook."""

    content: str

    def save(self, path: str | Path) -> Path:
        """Write the page to a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.content, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # A frame of its own, without the notebook's origin: nothing in it can reach the notebook.
        return (
            f'<iframe srcdoc="{html.escape(self.content, quote=True)}" sandbox="allow-scripts" '
            'style="width:100%;height:760px;border:1px solid #ddd"></iframe>'
        )


def show(run: Run, sample: pd.Series | int) -> Html:
    """A page of one sample with the others of its group beside it."""
    row = run.read_sample(sample)
    pool = run.samples if row["dataset"] == "train" else run.evals
    same = pool[(pool["step"] == row["step"]) & (pool["group_index"] == row["group_index"])]
    same = same[same["dataset"] == row["dataset"]]
    ordered = pd.concat([same[same["index"] == row["index"]], same[same["index"] != row["index"]]])
    return page(run, ordered, len(ordered), title=f"{run.name}: sample {row['index']}", overview=False)


def browse(run: Run, max_samples: int = 10_000, *, picture: bytes | None = None) -> Html:
    """A page of the run's samples, training and evaluation, at most `max_samples` of them."""
    samples = pd.concat([frame for frame in (run.samples, run.evals) if len(frame)] or [run.samples])
    chosen = data.choose(samples.reset_index(drop=True), max_samples)
    return page(run, chosen, len(samples), title=run.name, overview=True, picture=picture)


def page(
    run: Run, chosen: pd.DataFrame, total: int, *, title: str, overview: bool, picture: bytes | None = None
) -> Html:
    """Put a page together."""
    rows = data.read_all(run, chosen)
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    blocks: dict[str, Any] = {
        "meta": data.meta_of(run, len(rows), total, overview=overview),
        "index": data.index_of(rows),
        "vocabulary": data.vocabulary_of(rows, run.vocabulary),
    }
    starts = list(range(0, len(records), data.BLOCK))
    for number, start in enumerate(progress(starts, "writing samples")):
        part = records[start : start + data.BLOCK]
        blocks[f"texts-{number}"] = [data.texts_of(row, run.vocabulary) for row in part]
        blocks[f"tokens-{number}"] = [data.tokens_of(row) for row in part]
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed = [
        f'<script type="text/plain" id="{name}">{_packed(value)}</script>' for name, value in blocks.items()
    ]
    content = Template(_asset("report.html")).substitute(
        title=html.escape(title),
        style=_asset("report.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        picture=_picture(picture),
        blocks="\n".join(packed),
    )
    return Html(content)


def dashboard_png(run: Run) -> bytes:
    """The dashboard as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, file = run.dashboard(), io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    plt.close(figure)
    return file.getvalue()


def _packed(value: Any) -> str:
    """JSON, gzip, base64: no character of it means anything to HTML. Lone surrogates stay JSON escapes."""
    raw = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")


def _picture(png: bytes | None) -> str:
    if png is None:
        return ""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return f'<details class="dashboard"><summary>Dashboard</summary><img alt="dashboard" src="{source}"></details>'


def _asset(name: str) -> str:
    return resources.files("analysis").joinpath("assets", name).read_text(encoding="utf-8")
