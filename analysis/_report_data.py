"""What a report page holds, as plain data: a line a sample, their texts, their tokens, curves and findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis._run import Run
from analysis._tokens import message_rows, prompt_messages
from analysis._vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 64  # samples; the same number as in detail.js
_PREVIEW = 160  # characters
_EXTRA = ["label", "rewards", "metadata"]
_EVAL_COLOURS = ["#D55E00", "#009E73", "#CC79A7", "#56B4E9"]


def choose(samples: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` rows: whole groups, evenly from the whole run."""
    if len(samples) <= most:
        return samples
    group = samples.groupby(["dataset", "step", "group_index"], observed=True, sort=False).ngroup().to_numpy()
    count = int(group.max()) + 1
    wanted = max(1, int(count * most / len(samples)))
    chosen = np.unique(np.linspace(0, count - 1, wanted).round().astype(int))
    return samples[np.isin(group, chosen)].head(most)


def read_all(run: Run, chosen: pd.DataFrame) -> pd.DataFrame:
    """All columns of the chosen rows; the files of other steps stay closed."""
    keys = ["dataset", "step", "attempt", "index"]
    steps = chosen.loc[chosen["dataset"] == "train", "step"].unique().tolist()
    parts = [run.read_samples("all", steps=steps)] if steps else []
    if (chosen["dataset"] != "train").any():
        parts.append(run.read_evals("all"))
    if not parts:
        return run.read_samples("all", steps=[])
    rows = pd.concat(
        [part.astype({"dataset": "string", "status": "string"}) for part in parts], ignore_index=True
    )
    return chosen[keys].astype({"dataset": "string"}).merge(rows, on=keys, how="left")


def index_of(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """One entry a sample in every list: what the list of the page shows and sorts by."""
    return {
        "step": rows["step"].tolist(),
        "dataset": rows["dataset"].astype(str).tolist(),
        "group": _numbers(rows["group_index"]),
        "index": _numbers(rows["index"]),
        "status": rows["status"].astype(str).tolist(),
        "reward": _numbers(rows["reward"]),
        "advantage": _numbers(rows["train_reward"]),
        "length": rows["response_length"].tolist(),
        "preview": [
            text[:_PREVIEW].replace("\n", " ") if isinstance(text, str) else "" for text in rows["response"]
        ],
    }


def texts_of(row: Mapping[str, Any], vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The conversation and what belongs to it."""
    messages = message_rows(row, vocabulary)
    extra = [
        [name, row[name]] for name in _EXTRA if isinstance(row[name], str) and row[name] not in ("", "{}")
    ]
    return {
        "messages": [[message["role"], message["content"], message["trained"]] for message in messages],
        "prompt": len(prompt_messages(row["prompt"])),
        "extra": extra,
        "failure": row["failure"] if isinstance(row["failure"], str) else None,
        "versions": list(dict.fromkeys(_list(row["weight_versions"]))),
    }


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


def vocabulary_of(rows: pd.DataFrame, vocabulary: Vocabulary | None) -> dict[str, str]:
    """Texts of the ids that occur."""
    if vocabulary is None or rows.empty:
        return {}
    ids = np.unique(
        np.concatenate([np.asarray(_list(ids), dtype=np.int64) for ids in rows["tokens"]])
    ).tolist()
    return {str(i): text for i, text in zip(ids, vocabulary.texts(ids), strict=True) if text is not None}


def meta_of(run: Run, shown: int, total: int, *, overview: bool) -> dict[str, Any]:
    """What stands above the list."""
    facts = [[key, value] for key, value in run._summary().items()] if overview else []
    findings = [vars(finding) for finding in run.doctor()] if overview else []
    return {
        "facts": facts,
        "findings": findings,
        "charts": list(_charts(run)) if overview else [],
        "marks": _attempt_marks(run),
        "overview": overview,
        "total": total,
        "left_out": total - shown,
    }


def _charts(run: Run) -> Iterator[list[Any]]:
    steps = run.steps
    evals = [str(name) for name in steps if str(name).startswith("eval/") and str(name).count("/") == 1]
    reward = [_series(steps, "rollout/reward", "training", "#0072B2")]
    # The evaluation on the line of step k used the weights that step k + 1 generates with.
    for name, colour in zip(evals, _EVAL_COLOURS * len(evals), strict=False):
        reward.append({**_series(steps, name, name.removeprefix("eval/"), colour, shift=1), "dots": True})
    yield ["Mean reward", [series for series in reward if series["x"]]]
    length = [
        _series(steps, "rollout/response_length", "mean", "#0072B2"),
        _series(steps, "rollout/response_length_max", "longest", "#E69F00"),
    ]
    yield ["Response length (tokens)", [series for series in length if series["x"]]]


def _attempt_marks(run: Run) -> list[dict[str, Any]]:
    """Where a later attempt of the job took over."""
    first = run.steps[run.steps["step"] >= 0].groupby("attempt")["step"].min()
    return [{"x": int(step), "label": f"attempt {attempt}"} for attempt, step in list(first.items())[1:]]


def _series(steps: pd.DataFrame, name: str, label: str, colour: str, shift: int = 0) -> dict[str, Any]:
    values = steps.set_index("step")[name].dropna() if name in steps else pd.Series(dtype=float)
    values = values[np.isfinite(values.astype("float64"))]
    return {"label": label, "colour": colour, "x": (values.index + shift).tolist(), "y": values.tolist()}


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
