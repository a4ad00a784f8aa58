"""The data of a page: a line a sample, their texts, their tokens, curves and findings, ready to become JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.checks.examine import examine
from analysis.frames.run import RunFrames
from analysis.frames.samples import message_rows, prompt_messages
from analysis.frames.sessions import RECORD, record_of, tree_rows
from analysis.frames.steps import metric, resumed_at
from analysis.plots.style import BLUE, EVAL_COLOURS, ORANGE
from analysis.reading.samples import TRAINER
from analysis.reading.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 64  # samples; the same number as in detail.js
TEXT_COLUMNS = [
    "prompt",
    "response",
    "label",
    "rewards",
    "metadata",
    "tokens",
    "loss_mask",
    "weight_versions",
]
TOKEN_COLUMNS = [*TEXT_COLUMNS, "rollout_log_probs", *TRAINER]
# Below 15 MB in all, whatever the run: a page that mail and a slow disk can carry.
_MOST_TOKENS = 300_000
_MOST_CHARACTERS = 14_000_000
_LEAST_TEXT = 200  # characters of a text that is cut
_PART = 256  # samples that are in memory at a time, or the samples of one step
_KEYS = ["step", "attempt", "index"]
_PREVIEW = 160  # characters
_EXTRA = ["label", "rewards", "metadata"]


def choose(samples: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` rows: whole groups, evenly from the whole run."""
    if len(samples) <= most:
        return samples
    group = samples.groupby(["dataset", "step", "group_index"], observed=True, sort=False).ngroup().to_numpy()
    count = int(group.max()) + 1
    wanted = max(1, int(count * most / len(samples)))
    chosen = np.unique(np.linspace(0, count - 1, wanted).round().astype(int))
    return samples[np.isin(group, chosen)].head(most)


def with_tokens(chosen: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Of which rows the page has the tokens: all if they are few, else whole groups, evenly from the whole run."""
    total = int((chosen["prompt_length"].fillna(0) + chosen["response_length"].fillna(0)).sum())
    if total <= _MOST_TOKENS:
        return np.ones(len(chosen), dtype=bool)
    return chosen.index.isin(choose(chosen, max(1, len(chosen) * _MOST_TOKENS // total)).index)


def longest_text(run: RunFrames, chosen: pd.DataFrame) -> int | None:
    """The length in characters to which texts are cut so that all fit the page; None if they fit as they are."""
    names = ["prompt", "response"]
    lengths = [
        rows[name].astype("string").str.len().fillna(0).to_numpy(dtype=np.int64)
        for part in parts(chosen)
        for rows in [read_part(run, part, names)]
        for name in names
    ]
    found = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    if found.sum() <= _MOST_CHARACTERS:
        return None
    low, high = 0, int(found.max())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.minimum(found, middle).sum() <= _MOST_CHARACTERS else (low, middle)
    return max(low, _LEAST_TEXT)


def parts(chosen: pd.DataFrame) -> list[pd.DataFrame]:
    """The chosen rows in order, in parts of whole steps of one set, of few rows each."""
    found = []
    for _, rows in chosen.groupby(chosen["dataset"].astype("string"), sort=False):
        sizes = rows.groupby("step", sort=False).size()
        number = (sizes.cumsum() - 1) // _PART
        found += [part for _, part in rows.groupby(rows["step"].map(number), sort=False)]
    return found


def read_part(run: RunFrames, part: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The rows of a part with further columns; what can't be read is missing in its row."""
    steps = part["step"].unique().tolist()
    indices = None if part["index"].isna().any() else part["index"].unique().tolist()
    rows = run.read_set(str(part["dataset"].iloc[0]), steps, [*_KEYS, *columns], indices)
    rows = rows[[*_KEYS, *columns]].drop_duplicates(_KEYS)
    return part.drop(columns=columns, errors="ignore").merge(rows, on=_KEYS, how="left")


def index_of(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """One entry a sample in every list: what the list of the page shows and sorts by."""
    return {
        "step": rows["step"].tolist(),
        "dataset": rows["dataset"].astype(str).tolist(),
        "group": _numbers(rows["group_index"]),
        "index": _numbers(rows["index"]),
        "rollout": _numbers(rows["rollout_id"]),
        "status": rows["status"].astype(str).tolist(),
        "reward": _numbers(rows["reward"]),
        "advantage": _numbers(rows["train_reward"]),
        "length": rows["response_length"].tolist(),
        "preview": [
            text[:_PREVIEW].replace("\n", " ") if isinstance(text, str) else "" for text in rows["response"]
        ],
    }


def texts_of(
    row: Mapping[str, Any], vocabulary: Vocabulary | None, most: int | None = None
) -> dict[str, Any]:
    """The conversation and what belongs to it; texts of more than `most` characters are cut."""
    messages = message_rows(row, vocabulary)
    record = record_of(row["metadata"])
    told = {name: row[name] for name in _EXTRA} | ({"metadata": _without(row["metadata"])} if record else {})
    extra = [
        [name, cut(text, most)]
        for name, text in told.items()
        if isinstance(text, str) and text not in ("", "{}")
    ]
    return {
        "messages": [
            [message["role"], cut(message["content"], most), message["trained"]] for message in messages
        ],
        "prompt": len(prompt_messages(row["prompt"])),
        "extra": extra,
        "failure": cut(row["failure"], most) if isinstance(row["failure"], str) else None,
        "versions": list(dict.fromkeys(_list(row["weight_versions"]))),
        "session": session_of(record, most) if record else None,
    }


def _without(metadata: str) -> str:
    """Metadata without the record of a session, which the page shows as a tree."""
    return json.dumps({key: value for key, value in json.loads(metadata).items() if key != RECORD})


def session_of(record: Mapping[str, Any], most: int | None = None) -> dict[str, Any]:
    """A session as the page draws it: its turns in the order of the tree, each `[turn, depth, origin, forked from,
    tokens added, tokens sampled, why it ended, tools, seconds since the first turn began, seconds it took, sample]`."""
    rows = tree_rows(record)
    first = min((row["began"] for row in rows), default=0.0)
    return {
        "id": str(record.get("id")),
        "turns": [
            [
                *(int(row["turn"]), row["depth"], str(row["origin"]), _whole(row["forked_from"])),
                *(int(row["added_tokens"]), int(row["sampled_tokens"]), str(row["finish"])),
                [str(tool) for tool in row["tools"]],
                *(
                    round(row["began"] - first, 3),
                    round(row["ended"] - row["began"], 3),
                    _whole(row["sample"]),
                ),
            ]
            for row in rows
        ],
        "events": [
            [round(event["seconds"], 1), str(event["kind"]), cut(str(event["message"]), most)]
            for event in record.get("events") or ()
        ],
    }


def _whole(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def notes_of(run: RunFrames, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The notes on the run's samples, the newest first; `sample`: at which of `rows` it is, None if at none of them."""
    keys = ["dataset", *_KEYS]
    places = {
        key: at
        for at, key in enumerate(rows[keys].astype({"dataset": "string"}).itertuples(index=False, name=None))
    }
    found: list[dict[str, Any]] = []
    for _, note in run.notes.iloc[::-1].iterrows():
        key = (note["dataset"], *(_whole(note[name]) for name in _KEYS))
        tags = note["tags"] if isinstance(note["tags"], list) else []
        time = "" if pd.isna(note["time"]) else note["time"].strftime("%Y-%m-%d %H:%M")
        author = note["author"] if isinstance(note["author"], str) else ""
        own = {"text": str(note["text"]), "tags": [str(tag) for tag in tags], "author": author, "time": time}
        found.append(
            own | {"dataset": str(key[0]), "step": key[1], "index": key[3], "sample": places.get(key)}
        )
    return found


def cut(text: str, most: int | None) -> str:
    """The text, or its beginning and its end if it is longer than `most` characters."""
    if most is None or len(text) <= most:
        return text
    head, tail = most * 3 // 4, most - most * 3 // 4
    return f"{text[:head]}\n[… {len(text) - most:,} characters are not in this page …]\n{text[-tail:]}"


def tokens_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids of the sample, and the numbers of its response; a list that is not recorded is null."""
    ids, response = _list(row["tokens"]), int(row["response_length"])
    engine, trainer = _floats(row["rollout_log_probs"]), _floats(row["trainer_log_probs"])
    both = engine is not None and trainer is not None and len(engine) == len(trainer)
    return {
        "ids": ids,
        "start": len(ids) - response,
        "mask": _list(row["loss_mask"]) or [1] * response,
        "engine": _rounded(engine),
        "trainer": _rounded(trainer),
        "gap": _rounded(trainer - engine, significant=True) if both else None,  # type: ignore[operator]
        "entropy": _rounded(_floats(row["trainer_entropies"])),
        "advantage": _rounded(_floats(row["advantages"])),
    }


def vocabulary_of(used: set[int], vocabulary: Vocabulary | None) -> dict[str, str]:
    """Texts of the ids that occur."""
    if vocabulary is None:
        return {}
    ids = sorted(used)
    return {str(i): text for i, text in zip(ids, vocabulary.texts(ids), strict=True) if text is not None}


def meta_of(
    run: RunFrames, shown: int, total: int, *, overview: bool, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything above the list: headlines, findings, curves, how many samples are left out, and notes."""
    facts = [[key, value] for key, value in run.headlines().items()] if overview else []
    findings = [vars(finding) for finding in examine(run)] if overview else []
    return {
        "facts": facts,
        "findings": findings,
        "charts": list(_charts(run)) if overview else [],
        "marks": [{"x": step, "label": f"attempt {attempt}"} for attempt, step in resumed_at(run.steps)],
        "overview": overview,
        "notes": list(notes),
        "total": total,
        "left_out": total - shown,
    }


def _charts(run: RunFrames) -> Iterator[list[Any]]:
    steps = run.steps
    reward = [_series(metric(steps, "rollout/reward"), "training", BLUE)]
    evals = run.eval_scores
    for (name, scores), colour in zip(evals.items(), EVAL_COLOURS * len(evals), strict=False):
        reward.append({**_series(scores, name, colour), "dots": True})
    yield ["Mean reward", [series for series in reward if series["x"]]]
    length = [
        _series(metric(steps, "rollout/response_length"), "mean", BLUE),
        _series(metric(steps, "rollout/response_length_max"), "longest", ORANGE),
    ]
    yield ["Response length (tokens)", [series for series in length if series["x"]]]


def _series(values: pd.Series, label: str, colour: str) -> dict[str, Any]:
    values = values[np.isfinite(values.astype("float64"))]
    return {"label": label, "colour": colour, "x": values.index.tolist(), "y": values.tolist()}


def _numbers(column: pd.Series) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in column.fillna(np.nan).tolist()]


def _list(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, list) else []


def _floats(value: Any) -> npt.NDArray[np.float64] | None:
    return np.asarray(value, dtype=np.float64) if isinstance(value, np.ndarray | list) else None


def _rounded(
    values: npt.NDArray[np.float64] | None, *, significant: bool = False
) -> list[float | None] | None:
    """Four decimals, or three significant digits: more would only make the page large."""
    if values is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (2 - np.floor(np.log10(np.abs(values)))) if significant else np.full(len(values), 1e4)
        scale = np.where(np.isfinite(scale), scale, 1.0)
        result = np.round(values * scale) / scale
    if np.isfinite(result).all():
        return result.tolist()
    return [value if np.isfinite(value) else None for value in result.tolist()]
