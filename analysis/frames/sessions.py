"""Frames of agents' sessions: one row a session, one row a turn, and a session as a tree to read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

# Where the gateway leaves a session's record (rltrain/agents/gateway/session.py): in the first sample's metadata.
RECORD = "agent_session"
SESSION_COLUMNS = [
    "step",
    "attempt",
    "dataset",
    "group_index",
    "index",
    "rollout_id",
    "status",
    "reward",
    "metadata",
]
COLUMNS = [
    "step", "attempt", "dataset", "group_index", "index", "rollout_id", "session", "outcome", "reward", "samples",
    "turns", "forks", "tool_calls", "seconds", "generation_seconds", "tool_seconds", "prompt_tokens", "sampled_tokens",
    "added_tokens", "cached_share", "events",
]  # fmt: skip
TURN_COLUMNS = [
    "turn", "parent", "origin", "forked_from", "sample", "api", "began", "ended", "waited", "prompt_tokens",
    "added_tokens", "sampled_tokens", "cached_tokens", "finish", "tools",
]  # fmt: skip

_RECORDED = {*TURN_COLUMNS} - {"waited"}


def record_of(metadata: Any) -> dict[str, Any] | None:
    """The record of a session in a sample's metadata, a JSON text; None if there is none."""
    if not isinstance(metadata, str) or RECORD not in metadata:
        return None
    try:
        record = json.loads(metadata)[RECORD]
    except (ValueError, KeyError, TypeError):
        return None
    turns = record.get("turns") if isinstance(record, dict) else None
    is_whole = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.keys() >= _RECORDED for turn in turns
    )
    return record if is_whole else None


def sessions_frame(samples: pd.DataFrame) -> pd.DataFrame:
    """One row a session, from samples with `SESSION_COLUMNS`. Columns and units: `analysis/README.md`."""
    rows = []
    found = samples[samples["metadata"].astype("string").str.contains(RECORD, regex=False, na=False)]
    for _, row in found.iterrows():
        record = record_of(row["metadata"])
        if record is not None:
            rows.append(dict(row) | {"outcome": row["status"]} | _summary(record))
    return pd.DataFrame(rows, columns=COLUMNS)


def turns_frame(record: Mapping[str, Any]) -> pd.DataFrame:
    """One row a turn, in the order of the responses; `waited`: seconds before it in which no request was under way."""
    turns = sorted(record["turns"], key=lambda turn: turn["began"])
    waits: dict[int, float] = {}
    last: float | None = None
    for turn in turns:
        waits[turn["turn"]] = 0.0 if last is None else max(0.0, turn["began"] - last)
        last = turn["ended"] if last is None else max(last, turn["ended"])
    rows = [{**turn, "waited": round(waits[turn["turn"]], 4)} for turn in record["turns"]]
    frame = pd.DataFrame(rows, columns=TURN_COLUMNS)
    for name in ("parent", "forked_from", "sample"):
        frame[name] = frame[name].astype("Int64")
    return frame


def session_tree(record: Mapping[str, Any]) -> str:
    """The turns of a session as an indented tree: what each added and sampled, its tools, its time, and its sample."""
    rows = tree_rows(record)
    lines = [f"session {record.get('id')}: {len(rows)} turns in {record.get('seconds', 0):.1f} s"]
    lines += ["  " * row["depth"] + "└ " + _line(row) for row in rows]
    lines += [
        f"! {event['seconds']:.1f} s {event['kind']}: {event['message']}"
        for event in record.get("events") or ()
    ]
    return "\n".join(lines)


def tree_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `turns_frame` in the order of the tree, each with its `depth`."""
    turns: list[dict[str, Any]] = [dict(row) for _, row in turns_frame(record).iterrows()]
    children: dict[int | None, list[dict[str, Any]]] = {}
    for turn in turns:
        parent = None if pd.isna(turn["parent"]) else int(turn["parent"])
        children.setdefault(parent, []).append(turn)
    rows = []
    stack = [(turn, 0) for turn in reversed(children.get(None, []))]
    while stack:
        turn, depth = stack.pop()
        # A chain of turns is one column: only where it forks do its branches move to the right.
        siblings = children.get(int(turn["turn"]), [])
        deeper = depth + (len(siblings) > 1)
        stack += [(each, deeper) for each in reversed(siblings)]
        rows.append({**turn, "depth": depth})
    return rows


def _line(turn: Mapping[str, Any]) -> str:
    origin = str(turn["origin"])
    if not pd.isna(turn["forked_from"]):
        origin += f" of {turn['forked_from']}"
    tools = f", calls {', '.join(turn['tools'])}" if turn["tools"] else ""
    waited = f" after {turn['waited']:.2f} s" if turn["waited"] > 0 else ""
    sample = "not trained" if pd.isna(turn["sample"]) else f"sample {turn['sample']}"
    return (
        f"{turn['turn']} {origin}: +{turn['added_tokens']} tokens, {turn['sampled_tokens']} sampled, {turn['finish']}"
        f"{tools}, {turn['ended'] - turn['began']:.2f} s{waited} [{sample}]"
    )


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    turns = turns_frame(record)
    roots = turns["origin"] == "root"
    first = int(turns["prompt_tokens"].iloc[0]) if len(turns) else 0
    span = float(turns["ended"].max() - turns["began"].min()) if len(turns) else 0.0
    tool = float(turns["waited"].sum())
    return {
        "session": record.get("id"),
        "samples": int(turns["sample"].nunique()),
        "turns": len(turns),
        "forks": int((~roots & (turns["origin"] == "fork")).sum()),
        "tool_calls": sum(len(tools) for tools in turns["tools"]),
        "seconds": record.get("seconds"),
        "generation_seconds": span - tool,
        "tool_seconds": tool,
        "prompt_tokens": first,
        "sampled_tokens": int(turns["sampled_tokens"].sum()),
        "added_tokens": int(turns["added_tokens"].sum()) - first,
        "cached_share": _share(turns["cached_tokens"], turns["prompt_tokens"]),
        "events": _counted(event["kind"] for event in record.get("events") or ()),
    }


def _share(part: pd.Series, whole: pd.Series) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else 0.0


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in Counter(kinds).items())
