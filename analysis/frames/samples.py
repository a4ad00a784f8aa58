"""Frames of samples: groups of one prompt with pass@k, and one sample in detail, by token and as a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.reading.samples import KEYS
from analysis.reading.vocabulary import Vocabulary

GROUP_KEYS = [name for name in KEYS if name != "index"]
_PROMPT_ROLE = "prompt"


def groups_frame(samples: pd.DataFrame, threshold: float = 1.0) -> pd.DataFrame:
    """One row a group, in order of step.

    Args:
        samples: as of `Run.samples`.
        threshold: a sample is correct if its reward is at least this.

    Columns: `GROUP_KEYS`, `n`, `reward_mean`, `reward_std` (of the sample, n - 1; missing if n = 1), `reward_min`,
    `reward_max`, `correct`, `response_length` (mean), `zero_std`, and `pass@k` for k = 1, 2, 4 … up to the
    largest group.
    """
    correct = (samples["reward"] >= threshold).astype("int64")
    grouped = samples.assign(correct=correct).groupby(GROUP_KEYS, observed=True, sort=True)
    frame = grouped.agg(
        n=("index", "size"),
        reward_mean=("reward", "mean"),
        reward_std=("reward", "std"),
        reward_min=("reward", "min"),
        reward_max=("reward", "max"),
        correct=("correct", "sum"),
        response_length=("response_length", "mean"),
    ).reset_index()
    # Comparing, not std == 0: the mean of equal numbers can differ from them by rounding.
    frame["zero_std"] = frame["reward_min"] == frame["reward_max"]
    largest = int(frame["n"].max()) if len(frame) else 1
    for k in (2**i for i in range(largest.bit_length())):
        frame[f"pass@{k}"] = pass_at_k(frame["n"].to_numpy(), frame["correct"].to_numpy(), k)
    return frame


def pass_at_k(n: npt.ArrayLike, correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """Unbiased chance that at least one of k samples is correct: 1 - C(n - c, k) / C(n, k).

    Missing where n < k. Source: Chen et al., Evaluating Large Language Models Trained on Code, 2107.03374.

    Args:
        n: samples of each problem.
        correct: how many of them are correct.
        k: at least 1.
    """
    total, right = np.asarray(n, dtype=np.int64), np.asarray(correct, dtype=np.int64)
    if k < 1 or np.any(right > total) or np.any(right < 0):
        raise ValueError("pass@k needs k >= 1 and 0 <= correct <= n")
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(int(total.max(initial=1)), k) + 1)))])
    wrong = total - right
    none_right = np.exp(
        logs[wrong] - logs[np.maximum(wrong - k, 0)] + logs[np.maximum(total - k, 0)] - logs[total]
    )
    return np.where(total < k, np.nan, np.where(wrong < k, 1.0, 1.0 - none_right))


def tokens_frame(sample: pd.Series, vocabulary: Vocabulary | None = None) -> pd.DataFrame:
    """One row a token of prompt and response.

    Args:
        sample: a row of `read_samples("all")`.
        vocabulary: for the column `token`; without it the texts are missing.

    Columns: the keys of the sample, `position` (from 0), `part` (prompt or response), `id`, `token`, `mask` (1: trained
    on; 0 in the prompt), `log_prob_engine`, `log_prob_trainer`, `gap` (trainer - engine), `entropy`, all in nats,
    `advantage` and `weight_version`. A value that is not recorded is missing.
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
    """One row per message: the prompt's messages, then the response, split where a tool wrote instead of the model.

    The parts of a response that the loss mask leaves out are from a tool or an environment (role `tool`); splitting
    the text there needs the vocabulary. Columns: the keys of the sample, `turn`, `role`, `content`, `trained`,
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
    messages = chat_messages(prompt)
    if messages is not None:
        return messages
    return [(_PROMPT_ROLE, prompt)] if isinstance(prompt, str) else []


def chat_messages(prompt: Any) -> list[tuple[str, str]] | None:
    """Role and content of each message of a prompt that is chat messages as JSON; None for any other prompt."""
    if not isinstance(prompt, str) or not prompt.startswith("["):
        return None
    try:
        return [(str(message["role"]), _content(message)) for message in json.loads(prompt)]
    except (ValueError, TypeError, KeyError):  # plain text that begins with a bracket
        return None


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
    # One segment is the model's, even if all of it is masked: then the sample failed.
    if vocabulary is None or len(segments) < 2:
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
