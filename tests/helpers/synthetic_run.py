"""Write a small run directory without a job: what the analysis tests and notebooks read.

Deterministic. The run is preempted once (two attempts overlap by two steps) and holds evaluations, a
failed and a truncated sample, text that tries to break a terminal or a web page, and a line of metrics
that is still being written. `python tests/helpers/synthetic_run.py DIR` writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table

GROUPS, GROUP_SIZE = 4, 4
LIMIT = 64  # tokens of a response
EVAL_INTERVAL = 5
START = 1_750_000_000.0
STEP_SECONDS = 8.0
HOSTILE = "<script>alert('x')</script> \x1b[31mred\x1b[0m \u202ereversed \u0007"

_CONFIG = f"""\
[train]
prompt_data = "data/train.jsonl"
rollout_batch_size = {GROUPS}
n_samples_per_prompt = {GROUP_SIZE}
rollout_max_response_len = {LIMIT}
lr = 1e-5
"""


def write_run(root: Path, *, steps: int = 20, seed: int = 0) -> RunLayout:
    """Write a run of `steps` steps (at least 6) below `root` and return its paths."""
    layout = RunLayout(root)
    root.mkdir(parents=True, exist_ok=True)
    layout.config.write_text(_CONFIG)
    layout.run_json.write_text(json.dumps({"name": layout.name, "created": START}))
    half = steps // 2
    metrics, events = [], [_event(0, -60, "run_submitted")]
    for attempt, attempt_steps in enumerate([range(half + 2), range(half, steps)]):
        events.append(_event(attempt, attempt_steps.start - 1, "attempt_started"))
        if attempt == 0:
            metrics.append(
                {"step": -1, "attempt": 0, "time": START, **_write_eval(layout, -1, 0, steps, seed)}
            )
        for step in attempt_steps:
            # The attempt is in the seed: a test must be able to tell the attempts' samples apart.
            rng = random.Random(f"{seed} {attempt} {step}")
            samples = [_sample(rng, step, i, _skill(step, steps)) for i in range(GROUPS * GROUP_SIZE)]
            _write_samples(layout.step_dir(step, attempt), samples, step, attempt, "train")
            row = {
                "step": step,
                "attempt": attempt,
                "time": _time(attempt, step + 1),
                **_metrics(rng, samples),
            }
            if (step + 1) % EVAL_INTERVAL == 0:
                row |= _write_eval(layout, step, attempt, steps, seed)
            metrics.append(row)
            events.append(_event(attempt, step + 1, "weights_updated", role="trainer", index=0, step=step))
        state = "finished" if attempt else "stopped"
        events.append(_event(attempt, attempt_steps.stop, "attempt_finished", state=state, exit_code=0))
    lines = [json.dumps(row) + "\n" for row in metrics]
    layout.metrics.write_text("".join(lines) + '{"step": ' + str(steps))
    layout.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    return layout


def _skill(step: int, steps: int) -> float:
    """Chance of a right answer after `step` + 1 steps: a learning curve."""
    return 0.15 + 0.75 / (1 + math.exp(-8 * ((step + 1) / steps - 0.45)))


def _time(attempt: int, step: float) -> float:
    return START + 300.0 * attempt + STEP_SECONDS * step


def _event(attempt: int, at: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": _time(attempt, at), "attempt": attempt, "kind": kind, **fields}


def _sample(rng: random.Random, step: int, i: int, skill: float) -> Sample:
    left, right = rng.randint(1, 99), rng.randint(1, 99)
    correct = rng.random() < skill
    answer = left + right if correct else left + right + rng.randint(1, 9)
    length = min(LIMIT, max(3, int(rng.lognormvariate(2.2 + skill, 0.5))))
    sample = Sample(
        group_index=step * GROUPS + i // GROUP_SIZE,
        index=step * GROUPS * GROUP_SIZE + i,
        prompt=[{"role": "user", "content": f"What is {left} + {right}?"}],
        tokens=list(range(10, 22)),
        response=f"{left} plus {right} makes {answer}." + (f" {HOSTILE}" if i == 0 else ""),
        label=str(left + right),
        reward=float(correct),
        weight_versions=[str(max(step, 0))],
        status=Sample.Status.TRUNCATED if length == LIMIT else Sample.Status.COMPLETED,
        generate_seconds=0.05 * length,
        reward_seconds=0.002,
    )
    sample.append_response_tokens(
        tokens=[rng.randrange(30, 90) for _ in range(length)],
        log_probs=[-rng.expovariate(2.0) for _ in range(length)],
    )
    if i == 5 and step % 7 == 3:
        sample.status, sample.failure, sample.reward = (
            Sample.Status.FAILED,
            "reward: timed out after 30 s",
            0.0,
        )
        sample.loss_mask = [0] * length
    return sample


def _write_samples(directory: Path, samples: list[Sample], step: int, attempt: int, dataset: str) -> None:
    rewards = [float(sample.reward) for sample in samples]  # type: ignore[arg-type]
    groups = [rewards[i - i % GROUP_SIZE :][:GROUP_SIZE] for i in range(len(rewards))]
    table = samples_to_table(
        samples,
        step=step,
        attempt=attempt,
        dataset=dataset,
        rewards=rewards,
        train_rewards=[_normalised(reward, group) for reward, group in zip(rewards, groups, strict=True)],
    )
    directory.mkdir(parents=True)
    pq.write_table(table, directory / "part-0.parquet")


def _normalised(reward: float, group: list[float]) -> float:
    mean = sum(group) / len(group)
    variance = sum((value - mean) ** 2 for value in group) / (len(group) - 1)
    return (reward - mean) / (math.sqrt(variance) + 1e-6)


def _write_eval(layout: RunLayout, step: int, attempt: int, steps: int, seed: int) -> dict[str, float]:
    """Evaluate after `step`: samples into their files, metrics as the answer."""
    rng = random.Random(f"{seed} eval {step}")
    samples = [_sample(rng, step + 1, i, _skill(step, steps)) for i in range(40)]
    _write_samples(layout.eval_dir("sums", step + 1, attempt), samples, step + 1, attempt, "sums")
    return {
        "eval/sums": sum(float(sample.reward) for sample in samples) / len(samples),  # type: ignore[arg-type]
        "eval/sums/response_length": sum(sample.response_length for sample in samples) / len(samples),
    }


def _metrics(rng: random.Random, samples: list[Sample]) -> dict[str, float]:
    count = len(samples)
    tokens = sum(sample.response_length for sample in samples)
    phases = {
        "perf/generate_s": rng.uniform(3.6, 4.4),
        "perf/reward_s": rng.uniform(0.2, 0.4),
        "perf/train_s": rng.uniform(2.0, 2.3),
        "perf/update_weights_s": rng.uniform(0.4, 0.5),
        "perf/save_s": 0.6 if rng.random() < 0.2 else 0.0,
    }
    step_seconds = sum(phases.values()) + 0.2
    return {
        "rollout/reward": sum(float(sample.reward) for sample in samples) / count,  # type: ignore[arg-type]
        "rollout/response_length": sum(sample.response_length for sample in samples) / count,
        "rollout/truncated_ratio": sum(sample.status is Sample.Status.TRUNCATED for sample in samples)
        / count,
        "rollout/failed_ratio": sum(sample.status is Sample.Status.FAILED for sample in samples) / count,
        "rollout/tokens": tokens,
        "train/loss": rng.gauss(0.0, 0.02),
        "train/grad_norm": rng.uniform(0.4, 1.2),
        "train/logprob_abs_diff": rng.uniform(1.5e-6, 3e-6),
        "train/logprob_abs_diff_max": rng.uniform(1e-5, 3e-5),
        **phases,
        "perf/step_s": step_seconds,
        "perf/tokens_per_s": tokens / phases["perf/generate_s"],
    }


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])).root)
