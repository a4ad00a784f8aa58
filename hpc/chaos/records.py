"""What must be true of the records of a storm with real roles: its samples, and what W&B has of it.

`hpc.chaos.verdict` looks at what stand-ins have, too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from rltrain.run.files import read_json, read_lines
from rltrain.run.layout import RunLayout
from rltrain.run.metric_lines import newest_rows
from rltrain.schema import SCHEMA, read_table
from rltrain.tracking import is_whole, last_whole_step
from rltrain.wandb_file import HISTORY, read_history, read_records, record_kind

_COLUMNS = ["step", "attempt", "index", "group_index", "reward", "response_length", "tokens"]


@dataclass(frozen=True)
class Kept:
    """What outlived the attempt that it was made in.

    Attributes:
        samples: that one attempt finished and a later one trained.
        tokens: of their responses.
        begun: responses that were begun, put aside, and gone on with from the token where they stood.
        begun_tokens: that they had by then.
    """

    samples: int = 0
    tokens: int = 0
    begun: int = 0
    begun_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.samples} finished samples ({self.tokens} tokens) were trained by a later attempt,"
            f" {self.begun} begun ones ({self.begun_tokens} tokens) were gone on with"
        )


def judge(layout: RunLayout, steps: int, undisturbed: RunLayout | None) -> tuple[list[str], Kept]:
    """What is not as it must be, in words; and what outlived its attempt.

    Args:
        layout: of the run, which has ended.
        steps: that it was to train.
        undisturbed: of the same run that nothing has happened to; the samples must be the same, token by token. None if
            there is none, or if responses depend on chance.
    """
    samples = trained_samples(layout)
    newest = newest_rows(read_lines(layout.metrics))  # a fault tears lines; what they lack, we see
    rows = pd.DataFrame(list(newest.values()) or {"step": [], "attempt": []})
    rollout = tomllib.loads(layout.config.read_text())["train"]
    batch = rollout["rollout_batch_size"] * rollout["n_samples_per_prompt"]
    problems = [*of_batches(samples, steps, batch), *of_metrics(samples, rows), *of_finished(layout)]
    begun, cut = begun_responses(layout, samples)
    if undisturbed is not None:
        problems += of_tokens(samples, trained_samples(undisturbed))
    problems += [*cut, *of_wandb(layout, steps)]
    later = samples.merge(rows[["step", "attempt"]], on="step", suffixes=("", "_trained"))
    later = later[later["attempt"] < later["attempt_trained"]]
    tokens = int(later["response_length"].sum())
    return problems, Kept(len(later), tokens, len(begun), sum(begun))


def trained_samples(layout: RunLayout) -> pd.DataFrame:
    """Those of the newest attempt of every step."""
    found = [directory for step in layout.steps() if (directory := layout.find_step(step))]
    tables = [read_table(directory) for directory in found] or [SCHEMA.empty_table()]
    return pa.concat_tables([table.select(_COLUMNS) for table in tables]).to_pandas()


def of_batches(samples: pd.DataFrame, steps: int, batch: int) -> list[str]:
    """Every step has a whole batch, and no sample is in two."""
    problems = []
    sizes = samples.groupby("step").size().reindex(range(steps), fill_value=0)
    if wrong := {step: int(size) for step, size in sizes.items() if size != batch}:
        problems.append(f"steps with a number of samples other than {batch}: {wrong}")
    if beyond := sorted(set(samples["step"]) - set(range(steps))):
        problems.append(f"there are samples of steps {beyond}, which were not asked for")
    if twice := sorted(samples.loc[samples["index"].duplicated(), "index"]):
        problems.append(f"samples were trained twice: {twice}")
    expected = set(range(steps * batch))
    if lost := sorted(expected - set(samples["index"])):
        problems.append(f"samples were drawn and not trained: {lost}")
    return problems


def of_metrics(samples: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """What the trainer logged of a step is what the step's file has."""
    means = samples.groupby("step")[["reward", "response_length"]].mean()
    logged = rows.set_index("step").reindex(columns=["rollout/reward", "rollout/response_length"])
    logged.columns = means.columns
    gaps = (means - logged).abs()  # not a number where either lacks the step
    wrong = {name: sorted(gaps.index[gaps[name] > 1e-6]) for name in gaps.columns}
    return [f"the {name} of steps {each} differs from their samples" for name, each in wrong.items() if each]


def of_finished(layout: RunLayout) -> list[str]:
    """No finished batch was thrown away and generated again."""
    again = {}
    for step in layout.steps():
        attempts = sorted(file.parent.name for file in layout.step_dir(step, 0).parent.glob("*/*.parquet"))
        if len(attempts) > 1:
            again[step] = attempts
    return [f"batches were finished and generated again: {again}"] if again else []


def begun_responses(layout: RunLayout, samples: pd.DataFrame) -> tuple[list[int], list[str]]:
    """Lengths of the responses that were set aside (partial rollouts), and problems with those that were not continued
    correctly."""
    trained, lengths, cut = _by_index(samples), [], []
    for file in sorted(layout.rollout_state.glob("*.json")):
        for sample in _aside(file):
            index, begun = sample["index"], tuple(sample["tokens"])
            if not sample["response_length"] or index not in trained or trained[index][0] <= int(file.stem):
                continue
            lengths.append(sample["response_length"])
            if trained[index][1][: len(begun)] != begun:
                cut.append(index)
    return lengths, [f"responses lost tokens that they had: {sorted(set(cut))}"] if cut else []


def _aside(file: Path) -> list[dict[str, Any]]:
    return [sample for group in json.loads(file.read_text())["buffer"] for sample in group]


def of_tokens(samples: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
    """Checks that the samples equal an undisturbed run's."""
    ours, theirs = _by_index(samples), _by_index(expected)
    wrong = sorted(index for index in ours.keys() & theirs.keys() if ours[index] != theirs[index])
    if not wrong:
        return []
    steps = sorted({ours[index][0] for index in wrong})
    return [f"{len(wrong)} samples differ from an undisturbed run, from step {steps[0]} on: {wrong[:20]}"]


def _by_index(samples: pd.DataFrame) -> dict[int, tuple[int, tuple[int, ...], float]]:
    columns = ("index", "step", "tokens", "reward")
    return {
        index: (step, tuple(tokens), reward)
        for index, step, tokens, reward in zip(*(samples[name] for name in columns), strict=True)
    }


def of_wandb(layout: RunLayout, steps: int) -> list[str]:
    """All attempts are one run of W&B, which has every step once."""
    own = (read_json(layout.run_json) or {}).get("wandb_run_id")
    place = layout.root / "wandb"
    attempts = [path for path in place.rglob("offline-run-*") if path.is_dir()]
    if others := sorted(path.name for path in attempts if path.name.rpartition("-")[2] != own):
        return [f"W&B has further runs: {others}"]
    files = list(place.glob("offline-run-*/run-*.wandb"))
    if not files:
        return [f"W&B: {layout.root} holds no W&B file."]
    seen = [step for path in sorted(files) for step in wandb_steps(path)]
    # Of those that were killed, only what came after the last whole one has not been set aside. W&B's process has its
    # rows in memory for a while, and dies with the trainer's, so nobody can say how many of them are there.
    attempts = [path for path in attempts if path.parent == place]
    last = last_whole_step(attempts)
    safe = steps if all(map(is_whole, attempts)) else 0 if last is None else last + 1
    return of_wandb_rows(seen, steps, safe)


def wandb_steps(file: Path) -> list[int]:
    """The steps that a file of W&B has, each once: further lines of a step are part of its row. What a kill left of a
    record is not looked at."""
    records = [each for each in read_records(file, lambda reason: None) if record_kind(each) == HISTORY]
    return sorted({int(step) for step in read_history(records).get("step", []) if step is not None})


def of_wandb_rows(seen: Sequence[int], steps: int, safe: int) -> list[str]:
    """Every step once. An attempt that was killed as soon as the run was proven may lack the end, but nothing of the
    first `safe` steps, which whole attempts have."""
    problems = []
    if twice := sorted({step for step in seen if seen.count(step) > 1}):
        problems.append(f"W&B has steps twice: {twice}")
    missing = sorted(set(range(steps)) - set(seen))
    if missing and (missing[0] < safe or missing != list(range(missing[0], steps))):
        problems.append(f"W&B lacks steps {missing}")
    return problems
