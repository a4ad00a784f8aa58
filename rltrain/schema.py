"""The Parquet files that hold samples, the one format that rollout writes and others read: columns, rows, files.

One row a sample. The trainer trains on it, a restart reuses it, the notebook reads it. Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rltrain.run.files import replacing
from rltrain.run.plain import clean_text, plain_json
from rltrain.sample import Sample

# 2: trainer_log_probs, trainer_entropies. 3: rollout_id, weight_version_spans, and queue, prefill, decode and tool
# seconds; what 2 added is in files of its own now (TRAINER_SCHEMA).
# Readers take a column that an older file lacks as missing.
SCHEMA_VERSION = "3"
METRICS_KEY = b"slurmlime.metrics"
FILE_NAME = "part-0.parquet"

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # rollout_id: number of rollouts before this one
        ("attempt", pa.int32()),  # attempt of the job that generated it
        ("dataset", pa.string()),  # "train" or the name of the evaluation set
        ("group_index", pa.int64()),  # samples of one prompt share it
        ("index", pa.int64()),  # unique in the run
        ("rollout_id", pa.int64()),  # samples that share it were one rollout, of an agent with several texts
        ("prompt", pa.string()),  # text, or the messages as JSON
        ("response", pa.string()),
        ("label", pa.string()),
        ("status", pa.string()),  # Sample.Status value
        ("failure", pa.string()),  # why the sample failed
        ("reward", pa.float64()),  # scalar reward as graded
        ("train_reward", pa.float64()),  # after normalisation: what the advantage is made of
        ("rewards", pa.string()),  # a dict reward, as JSON
        ("prompt_length", pa.int32()),  # tokens
        ("response_length", pa.int32()),  # tokens
        # Where the time went; samples of one rollout share these but for the reward's.
        ("queue_seconds", pa.float64()),  # until an engine began with it, and the way there and back
        ("generate_seconds", pa.float64()),  # in the generation function: all but the wait before it
        ("prefill_seconds", pa.float64()),  # as engines report it, all requests together
        ("decode_seconds", pa.float64()),
        ("tool_seconds", pa.float64()),  # while no request was under way
        ("reward_seconds", pa.float64()),
        ("metadata", pa.string()),  # JSON
        ("tokens", pa.list_(pa.int32())),  # prompt and response
        ("loss_mask", pa.list_(pa.int8())),  # one a response token
        ("rollout_log_probs", pa.list_(pa.float32())),  # one a response token, or null
        ("teacher_log_probs", pa.list_(pa.float32())),  # the same, of --opd-type sglang
        ("weight_versions", pa.list_(pa.string())),  # all that wrote a part of the response
        # Which of them wrote which response tokens; what a tool wrote is in none.
        (
            "weight_version_spans",
            pa.list_(pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])),
        ),
    ],
    metadata={b"slurmlime.schema": SCHEMA_VERSION.encode()},
)

# What the trainer saw of a step's tokens: a file of its own (`RunLayout.trainer_dir`), because the samples are
# complete before they are trained on. Joins with the samples by step and index; the newest attempt holds.
TRAINER_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("attempt", pa.int32()),  # that trained on it; the sample's own may be older
        ("index", pa.int64()),  # of the sample
        # One a response token, also where the loss mask is 0.
        ("trainer_log_probs", pa.list_(pa.float32())),  # of the weights before the step
        ("trainer_entropies", pa.list_(pa.float32())),  # nats
        ("advantages", pa.list_(pa.float32())),
    ],
    metadata={b"slurmlime.schema": b"1"},
)

# A column that only runs with --use-rollout-routing-replay have: int16 [tokens − 1, layers, experts a token], as bytes.
ROUTES = "routed_experts"

TRAIN_COLUMNS = [
    "group_index", "index", "rollout_id", "status", "reward", "train_reward", "response_length",
    "tokens", "loss_mask", "rollout_log_probs", "teacher_log_probs", "step", "weight_versions",
]  # fmt: skip


def samples_to_table(
    samples: Sequence[Sample],
    *,
    step: int,
    attempt: int,
    dataset: str,
    rewards: Sequence[float | None],
    train_rewards: Sequence[float] | None = None,
    metrics: dict[str, float] | None = None,
) -> pa.Table:
    """Rows of `samples`; `rewards` (None: not graded) and `train_rewards` hold one scalar a sample."""
    rows = [
        {
            "step": step,
            "attempt": attempt,
            "dataset": dataset,
            "group_index": sample.group_index,
            "index": sample.index,
            "rollout_id": sample.rollout_key,
            "prompt": _text(sample.prompt),
            "response": clean_text(sample.response),
            "label": None if sample.label is None else _text(sample.label),
            "status": sample.status.value,
            "failure": None if sample.failure is None else _text(sample.failure),
            "reward": reward,
            "train_reward": train_rewards[i] if train_rewards is not None else None,
            "rewards": _text(sample.reward) if isinstance(sample.reward, dict) else None,
            "prompt_length": sample.prompt_length,
            "response_length": sample.response_length,
            "queue_seconds": sample.queue_seconds,
            "generate_seconds": sample.generate_seconds,
            "prefill_seconds": sample.prefill_seconds,
            "decode_seconds": sample.decode_seconds,
            "tool_seconds": sample.non_generation_time,
            "reward_seconds": sample.reward_seconds,
            "metadata": _text(sample.metadata),
            "tokens": sample.tokens,
            "loss_mask": sample.loss_mask or [1] * sample.response_length,
            "rollout_log_probs": sample.rollout_log_probs,
            "teacher_log_probs": sample.teacher_log_probs,
            "weight_versions": list(map(_text, sample.weight_versions)),
            "weight_version_spans": sample.weight_version_spans,
        }
        for i, (sample, reward) in enumerate(zip(samples, rewards, strict=True))
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    routes = [_routes(sample) for sample in samples]
    if any(routes):
        table = table.append_column(ROUTES, pa.array(routes, pa.large_binary()))
    return with_metrics(table, metrics or {})


def _routes(sample: Sample) -> bytes | None:
    """As stored: for every token but the last, -1 where none is known."""
    given, count = sample.rollout_routed_experts, len(sample.tokens) - 1
    if given is None or count < 1:
        return None
    flat = np.asarray(given).reshape(len(given), -1)
    routes = np.full((count, flat.shape[1]), -1, np.int16)
    routes[: len(flat)] = flat[:count]
    return routes.tobytes()


def table_to_samples(table: pa.Table) -> list[Sample]:
    """The inverse of `samples_to_table`, as far as the columns go; columns of newer versions may be missing.

    Raises:
        KeyError: one that every version has is missing.
    """
    return [_row_to_sample(row) for row in table.to_pylist()]


def _row_to_sample(row: dict[str, Any]) -> Sample:
    return Sample(
        group_index=row["group_index"],
        index=row["index"],
        rollout_id=row.get("rollout_id"),
        response=row["response"],
        response_length=row["response_length"],
        label=row["label"],
        failure=row["failure"],
        queue_seconds=row.get("queue_seconds") or 0.0,
        generate_seconds=row.get("generate_seconds") or 0.0,
        prefill_seconds=row.get("prefill_seconds") or 0.0,
        decode_seconds=row.get("decode_seconds") or 0.0,
        non_generation_time=row.get("tool_seconds") or 0.0,
        reward_seconds=row.get("reward_seconds") or 0.0,
        prompt=_messages(row["prompt"]),
        status=Sample.Status(row["status"]),
        reward=json.loads(row["rewards"]) if row["rewards"] else row["reward"],
        metadata=json.loads(row["metadata"] or "{}"),
        tokens=row["tokens"],
        loss_mask=row["loss_mask"],
        rollout_log_probs=row["rollout_log_probs"],
        weight_versions=row["weight_versions"] or [],
        weight_version_spans=row.get("weight_version_spans") or [],
        rollout_routed_experts=np.frombuffer(row[ROUTES], np.int16).reshape(len(row["tokens"]) - 1, -1)
        if row.get(ROUTES)
        else None,
    )


def _messages(prompt: str) -> str | list[dict[str, Any]]:
    """A prompt that was stored as JSON is a list of messages again; any other text is unchanged."""
    if prompt.startswith("[{"):
        try:
            return json.loads(prompt)
        except ValueError:
            pass
    return prompt


def with_metrics(table: pa.Table, metrics: dict[str, float]) -> pa.Table:
    """The same table with the rollout's metrics in its schema metadata."""
    metadata = {**(table.schema.metadata or {}), METRICS_KEY: plain_json(metrics).encode()}
    return table.replace_schema_metadata(metadata)


def read_metrics(schema: pa.Schema) -> dict[str, float]:
    """The metrics that `with_metrics` stored, or an empty dict."""
    return json.loads((schema.metadata or {}).get(METRICS_KEY, b"{}"))


def write_table(table: pa.Table, directory: Path) -> Path:
    """Write `directory/part-0.parquet`, in place of what an earlier try left."""
    return write_file(table, directory / FILE_NAME)


def write_file(table: pa.Table, path: Path) -> Path:
    """Write a Parquet file, in whichever directory: it is there and whole, or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def read_table(directory: Path) -> pa.Table:
    """The table that `write_table` wrote there, with its schema metadata."""
    return pq.read_table(directory / FILE_NAME, partitioning=None)


def _text(value: Any) -> str:
    return clean_text(value) if isinstance(value, str) else plain_json(value)
