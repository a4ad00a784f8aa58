"""One sample in detail: its tokens, one row each, and the conversation that they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from analysis._vocabulary import Vocabulary

KEYS = ["step", "attempt", "dataset", "group_index", "index"]
_PROMPT_ROLE = "prompt"


def tokens_frame(sample: pd.Series, vocabulary: Vocabulary | None = None) -> pd.DataFrame:
    """One row a token of prompt and response.

    Args:
        sample: a row of `read_samples("all")`.
        vocabulary: for the column `token`; without it the texts are missing.

    Columns: the keys of the sample, `position` (from 0), `part` (prompt or response), `id`, `token`, `mask` (1: trained
    on; 0 in the prompt), `log_prob_engine`, `log_prob_trainer`, `gap` (trainer - engine), `entropy`, all in nats,
    `advantage` and `weight_version`. What is not recorded is missing.
    """
    ids = _list(sample["tokens"])
    response = int(sample["response_length"])
    start = len(ids) - response
    mask = _list(sample["loss_mask"]) or [1] * response
    engine = _padded(sample["rollout_log_probs"], start, len(ids))
    trainer = _padded(sample["trainer_log_probs"], start, len(ids))
    frame = pd.DataFrame(
        {
            "position": np.arange(len(ids)),
            "part": ["prompt"] * start + ["response"] * response,
            "id": np.asarray(ids, dtype=np.int64),
            "token": vocabulary.texts(ids) if vocabulary else [None] * len(ids),
            "mask": np.asarray([0] * start + mask, dtype=np.int8),
            "log_prob_engine": engine,
            "log_prob_trainer": trainer,
            "gap": trainer - engine,
            "entropy": _padded(sample["trainer_entropies"], start, len(ids)),
            "advantage": _padded(sample["advantages"], start, len(ids)),
            "weight_version": [None] * start + _token_versions(sample, mask),
        }
    ).astype({"token": "string", "weight_version": "string", "part": "category"})
    for i, key in enumerate(KEYS):
        frame.insert(i, key, sample[key])
    return frame


def messages_frame(sample: pd.Series, vocabulary: Vocabulary | None = None) -> pd.DataFrame:
    """One row a message: those of the prompt, then the response, split where someone else than the model wrote.

    What the loss mask leaves out of a response is what a tool or an environment said (role `tool`); to split
    the text there takes the vocabulary. Columns: the keys of the sample, `turn`, `role`, `content`, `trained`,
    `tokens` (missing in the prompt).
    """
    rows = message_rows(sample, vocabulary)
    frame = pd.DataFrame(rows, columns=["role", "content", "trained", "tokens"]).astype({"tokens": "Int64"})
    frame.insert(0, "turn", np.arange(len(frame)))
    for i, key in enumerate(KEYS):
        frame.insert(i, key, sample[key])
    return frame


def message_rows(
    sample: pd.Series | Mapping[str, Any], vocabulary: Vocabulary | None
) -> list[dict[str, Any]]:
    """The rows of `messages_frame` without the keys."""
    prompt = [
        {"role": role, "content": content, "trained": False, "tokens": None}
        for role, content in prompt_messages(sample["prompt"])
    ]
    return prompt + _response_rows(sample, vocabulary)


def prompt_messages(prompt: Any) -> list[tuple[str, str]]:
    """Role and content of each message of a prompt as it is stored: text, or chat messages as JSON."""
    if not isinstance(prompt, str):
        return []
    if prompt.startswith("["):
        try:
            return [(str(message["role"]), _content(message)) for message in json.loads(prompt)]
        except (ValueError, TypeError, KeyError):  # plain text that begins with a bracket
            pass
    return [(_PROMPT_ROLE, prompt)]


def mask_segments(mask: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal mask: (mask, start, end)."""
    segments, start = [], 0
    for value, run in groupby(mask):
        end = start + len(list(run))
        segments.append((int(value), start, end))
        start = end
    return segments


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) if content else ""
    calls = message.get("tool_calls")
    return f"{text}\n{json.dumps(calls, ensure_ascii=False)}".strip() if calls else text


def _response_rows(
    sample: pd.Series | Mapping[str, Any], vocabulary: Vocabulary | None
) -> list[dict[str, Any]]:
    length = int(sample["response_length"])
    mask = (_list(sample["loss_mask"]) or [1] * length)[:length]
    segments = mask_segments(mask)
    if (
        vocabulary is None or len(segments) < 2
    ):  # all masked: the sample failed, the model wrote it all the same
        text = sample["response"] if isinstance(sample["response"], str) else ""
        return [{"role": "assistant", "content": text, "trained": any(mask), "tokens": length}]
    ids = _list(sample["tokens"])[-length:]
    return [
        {
            "role": "assistant" if value else "tool",
            "content": vocabulary.decode(ids[start:end]),
            "trained": bool(value),
            "tokens": end - start,
        }
        for value, start, end in segments
    ]


def _token_versions(sample: pd.Series, mask: list[int]) -> list[str | None]:
    """The weight version of each response token: from the spans, and in files without them from the versions."""
    spans = _list(sample.get("weight_version_spans"))
    if not spans:
        return _versions(_list(sample["weight_versions"]), mask)
    result: list[str | None] = [None] * len(mask)
    for span in spans:
        result[span["start"] : span["end"]] = [span["version"]] * (span["end"] - span["start"])
    return result


def _versions(versions: list[str], mask: list[int]) -> list[str | None]:
    """The weight version of each response token, where the recorded ones tell it."""
    written = [segment for segment in mask_segments(mask) if segment[0]]
    if len(set(versions)) == 1:
        return [versions[0] if value else None for value in mask]
    result: list[str | None] = [None] * len(mask)
    if len(versions) == len(written):
        for version, (_, start, end) in zip(versions, written, strict=True):
            result[start:end] = [version] * (end - start)
    elif len(versions) == len(mask):
        return list(versions)
    return result


def _list(value: Any) -> list[Any]:
    return [] if value is None or isinstance(value, float) else list(value)


def _padded(values: Any, start: int, length: int) -> np.ndarray:
    """`values` of the response with missing ones for the prompt."""
    result = np.full(length, np.nan)
    given = _list(values)
    result[start : start + len(given)] = given
    return result
