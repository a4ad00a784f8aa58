"""Pages to read samples in: one file that needs nothing else, neither network nor this package."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.frames.run import RunFrames
from analysis.pages import data
from analysis.plots.figures import dashboard, save_picture
from analysis.reading.progress import progress
from analysis.reading.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy.typing as npt

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


def show(run: RunFrames, sample: pd.Series | int) -> Html:
    """A page of one sample with the others of its group beside it."""
    row = run.read_sample(sample)
    pool = run.samples if row["dataset"] == "train" else run.evals
    same = pool[(pool["step"] == row["step"]) & (pool["group_index"] == row["group_index"])]
    same = same[same["dataset"] == row["dataset"]]
    ordered = pd.concat([same[same["index"] == row["index"]], same[same["index"] != row["index"]]])
    return page(run, ordered, len(ordered), title=f"{run.name}: sample {row['index']}", overview=False)


def browse(run: RunFrames, max_samples: int = 10_000, *, picture: bytes | None = None) -> Html:
    """A page of the run's samples, training and evaluation, at most `max_samples` of them."""
    samples = pd.concat([frame for frame in (run.samples, run.evals) if len(frame)] or [run.samples])
    chosen = data.choose(samples.reset_index(drop=True), max_samples)
    return page(run, chosen, len(samples), title=run.name, overview=True, picture=picture)


def page(
    run: RunFrames,
    chosen: pd.DataFrame,
    total: int,
    *,
    title: str,
    overview: bool,
    picture: bytes | None = None,
) -> Html:
    """A page of the chosen rows of `samples` and `evals`, of `total` such rows; `overview` adds curves and findings."""
    chosen = chosen.reset_index(drop=True)
    has_tokens = data.with_tokens(chosen) if overview else np.ones(len(chosen), dtype=bool)
    longest = data.longest_text(run, chosen) if overview else None
    samples = _Samples(run.vocabulary, longest)
    parts = data.parts(chosen)
    for part in progress(parts, "writing samples"):
        of_part = has_tokens[part.index]
        columns = data.TOKEN_COLUMNS if of_part.any() else data.TEXT_COLUMNS
        samples.add(data.read_part(run, part, columns), of_part)
    notes = _notes(int(has_tokens.sum()), len(chosen), longest)
    blocks = {
        "meta": _packed(data.meta_of(run, len(chosen), total, overview=overview, notes=notes)),
        "notes": _packed(data.notes_of(run, pd.concat(parts) if parts else chosen)),
        "index": _packed(samples.index or data.index_of(chosen.assign(response=None))),
        "vocabulary": _packed(data.vocabulary_of(samples.used, run.vocabulary)),
        **samples.blocks(),
    }
    packed = [f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blocks.items()]
    return Html(fill(title, picture=_picture(picture), blocks="\n".join(packed)))


def fill(title: str, *, picture: str = "", blocks: str = "", sources: str = "") -> str:
    """The page as HTML.

    Args:
        title: of the run or sample.
        picture: markup of the dashboard.
        blocks: markup of the data; without it the page fetches `blocks/NAME`.
        sources: further directives of its Content-Security-Policy.
    """
    script = "\n".join(asset(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(asset("report.html")).substitute(
        title=html.escape(title),
        style=asset("report.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        picture=picture,
        blocks=blocks,
        sources=sources,
    )


@dataclass
class _Samples:
    """The samples of a page, packed while they are added: only the last few of them are in memory as they are."""

    vocabulary: Vocabulary | None
    longest: int | None
    index: dict[str, list[Any]] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    _texts: list[Any] = field(default_factory=list)
    _tokens: list[Any] = field(default_factory=list)
    _packed: dict[str, str] = field(default_factory=dict)

    def add(self, rows: pd.DataFrame, has_tokens: npt.NDArray[np.bool_]) -> None:
        """Take up the next rows."""
        for name, values in data.index_of(rows).items():
            self.index.setdefault(name, []).extend(values)
        records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
        for row, with_tokens in zip(records, has_tokens, strict=True):
            self._texts.append(data.texts_of(row, self.vocabulary, self.longest))
            tokens = data.tokens_of(row) if with_tokens else None
            self._tokens.append(tokens)
            self.used.update(tokens["ids"] if tokens else ())
            if len(self._texts) == data.BLOCK:
                self._pack()

    def blocks(self) -> dict[str, str]:
        """All of them."""
        self._pack()
        return self._packed

    def _pack(self) -> None:
        number = len(self._packed) // 2
        self._packed[f"texts-{number}"] = _packed(self._texts)
        self._packed[f"tokens-{number}"] = _packed(self._tokens)
        self._texts, self._tokens = [], []


def _notes(with_tokens: int, total: int, longest: int | None) -> list[str]:
    """What the page does not have, so that it stays small enough to be opened."""
    notes = []
    if with_tokens < total:
        notes.append(f"tokens of {with_tokens:,} of {total:,} samples (of any other: run.show(…))")
    if longest is not None:
        notes.append(f"texts of more than {longest:,} characters are cut")
    return notes


def dashboard_png(run: RunFrames) -> bytes:
    """The dashboard as a picture."""
    file = io.BytesIO()
    save_picture(dashboard, run, file, dpi=90, file_format="png")
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


def asset(name: str) -> str:
    """A file of the page."""
    return resources.files("analysis.pages").joinpath("assets", name).read_text(encoding="utf-8")
