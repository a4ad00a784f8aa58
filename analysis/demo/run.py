"""One run directory of `analysis.demo_data`: the files that a real run leaves behind, step by step."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.demo.samples import Batch, Behaviour, make_samples, write_samples, write_trainer
from analysis.demo.text import write_tokenizer
from rltrain.run.errors import EXIT_REQUEUE
from rltrain.run.layout import RunLayout

START = 1_750_000_000.0
LIMIT = 64  # tokens of a response
EVAL_INTERVAL = 6


@dataclass(frozen=True)
class DemoRun:
    """One run to be written.

    Attributes:
        attempts: first and end of the steps of each attempt of the job.
        end: state of the last attempt.
    """

    name: str
    attempts: tuple[tuple[int, int], ...]
    behaviour: Behaviour
    lr: float = 1e-5
    torch: str = "2.13.0"
    end: str = "finished"


@dataclass(frozen=True)
class Size:
    """How much of it: steps of a whole run, groups a step, samples a group; and the seed of it all."""

    steps: int = 24
    groups: int = 6
    group_size: int = 8
    seed: int = 0


@dataclass
class _Recording:
    """A run while it is written: its clock, and the lines of its files so far."""

    layout: RunLayout
    run: DemoRun
    size: Size
    clock: float = START
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(self, attempt: int, kind: str, later: float = 0.0, **fields: Any) -> None:
        """Note an event `later` seconds from now."""
        self.events.append({"time": self.clock + later, "attempt": attempt, "kind": kind, **fields})

    def attempt(self, number: int) -> None:
        """A whole attempt of the job, from its start to its end."""
        self.event(number, "attempt_started", host="node01")
        for role in ("router", "rollout", "engine", "trainer"):
            self.clock += 12
            self.event(
                number, "role_ready", role=role, index=0, host="node02" if role == "engine" else "node01"
            )
        first, end = self.run.attempts[number]
        for step in range(first, end):
            self.step(number, step, resumed=number > 0 and step == first)
        self.end_of(number)

    def step(self, attempt: int, step: int, *, resumed: bool) -> None:
        """A step: its samples and the trainer's record of them, its metrics and events."""
        rng = random.Random(f"{self.size.seed} {self.run.name} {attempt} {step}")
        done = (step + 1) / self.size.steps
        batch = make_samples(
            rng, self.run.behaviour, done, step, self.size.groups, self.size.group_size, LIMIT
        )
        write_samples(self.layout.step_dir(step, attempt), batch, step, attempt, "train")
        write_trainer(self.layout.trainer_dir(step, attempt), batch, step, attempt)
        seconds = _phases(rng, batch)
        self.clock += seconds["perf/step_s"]
        row = {"step": step, "attempt": attempt, "time": self.clock, **batch.metrics, **seconds,
               **_train_metrics(rng, self.run, batch, resumed=resumed)}  # fmt: skip
        self.event(attempt, "weights_updated", role="trainer", version=step + 1)
        if (step + 1) % EVAL_INTERVAL == 0:
            row |= self.evaluation(attempt, step)
            self.event(attempt, "checkpoint_saved", role="trainer", step=step + 1)
        self.metrics.append(row)

    def evaluation(self, attempt: int, step: int) -> dict[str, float]:
        """Samples of the evaluation after a step; returns its metrics."""
        rng = random.Random(f"{self.size.seed} eval {step}")
        behaviour, done = self.run.behaviour.honest(), (step + 1) / self.size.steps
        batch = make_samples(rng, behaviour, done, step + 1, 20, 1, LIMIT)
        write_samples(self.layout.eval_dir("sums", step + 1, attempt), batch, step + 1, attempt, "sums")
        return {"eval/sums": batch.metrics["rollout/reward"],
                "eval/sums/response_length": batch.metrics["rollout/response_length"]}  # fmt: skip

    def end_of(self, attempt: int) -> None:
        """Why and how an attempt ends; unless it is the last, the next one waits for half an hour."""
        is_last = attempt == len(self.run.attempts) - 1
        if is_last and self.run.end == "failed":
            self.event(attempt, "role_died", 1, role="engine", index=0, exit_code=-9,
                       last_lines=["CUDA error: an illegal memory access was encountered"])  # fmt: skip
        elif not is_last:
            self.event(attempt, "stop_requested", 1, reason="preempted")
        state, code = (
            (self.run.end, 0 if self.run.end == "finished" else 1) if is_last else ("stopped", EXIT_REQUEUE)
        )
        self.event(attempt, "attempt_finished", 5, state=state, exit_code=code)
        if not is_last:
            self.event(attempt, "run_submitted", 6, job_id="4711", resumed=True)
        self.clock += 5 if is_last else 1805


def write_run(root: Path, run: DemoRun, size: Size) -> Path:
    """Write one run directory."""
    layout = RunLayout(root)
    root.mkdir(parents=True, exist_ok=True)
    layout.config.write_text(_config(run, size))
    packages = {"slurmlime": "0.1.0", "torch": run.torch, "sglang": "0.5.23"}
    identity = {"name": run.name, "created": "2025-06-15T15:06:40+00:00", "wandb_run_id": f"demo-{run.name}",
                "git_commit": "0" * 40, "python": "3.11.7", "packages": packages}  # fmt: skip
    layout.run_json.write_text(json.dumps(identity, indent=2) + "\n")
    write_tokenizer(root / "tokenizer")
    recording = _Recording(layout, run, size)
    recording.event(0, "run_submitted", -900, job_id="4711", resumed=False)
    for attempt in range(len(run.attempts)):
        recording.attempt(attempt)
    layout.metrics.write_text("".join(json.dumps(row) + "\n" for row in recording.metrics))
    layout.events.write_text("".join(json.dumps(row) + "\n" for row in recording.events))
    status = {"phase": recording.events[-1]["state"], "step": recording.metrics[-1]["step"] + 1,
              "num_rollout": size.steps, "attempt": len(run.attempts) - 1, "time": recording.clock}  # fmt: skip
    layout.status.write_text(json.dumps(status) + "\n")
    return root


def _phases(rng: random.Random, batch: Batch) -> dict[str, float]:
    seconds = {
        "perf/generate_s": 4 + batch.metrics["rollout/tokens"] / 1500 + rng.uniform(0, 0.5),
        "perf/reward_s": rng.uniform(0.2, 0.4),
        "perf/train_s": 2 + batch.metrics["rollout/tokens"] / 4000,
        "perf/update_weights_s": rng.uniform(0.4, 0.5),
        "perf/save_s": 0.6 if rng.random() < 0.2 else 0.0,
    }
    generate = seconds["perf/generate_s"]
    return {**seconds, "perf/step_s": sum(seconds.values()) + 0.2,
            "perf/rollout_s": generate + seconds["perf/reward_s"],
            "perf/tokens_per_s": batch.metrics["rollout/tokens"] / generate}  # fmt: skip


def _train_metrics(rng: random.Random, run: DemoRun, batch: Batch, *, resumed: bool) -> dict[str, float]:
    return {
        "train/loss": rng.gauss(0, 0.02),
        "train/pg_loss": rng.gauss(0, 0.02),
        "train/ppo_kl": (0.3 if resumed else 0.002) * rng.uniform(0.8, 1.2),
        "train/entropy": batch.entropy,
        "train/grad_norm": rng.uniform(0.4, 1.2),
        "train/lr": run.lr,
        "train/logprob_abs_diff": batch.gap_mean,
        "train/logprob_abs_diff_max": batch.gap_max,
    }


def _config(run: DemoRun, size: Size) -> str:
    return f"""[train]
hf_checkpoint = "tokenizer"
prompt_data = "data/train.jsonl"
actor_num_nodes = 1
actor_num_gpus_per_node = 4
rollout_num_gpus = 4
colocate = false
num_rollout = {size.steps}
rollout_batch_size = {size.groups}
n_samples_per_prompt = {size.group_size}
rollout_max_response_len = {LIMIT}
lr = {run.lr}
seed = 1234
wandb_project = "slurmlime"
wandb_team = "demo-team"
"""
