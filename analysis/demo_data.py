"""`python -m analysis.demo_data DIR`: recorded runs to try the analysis on, without training anything.

The same arguments write the same bytes. Four runs of a model that learns to add:

- `baseline` is preempted once and goes on from its checkpoint; a quarter of its prompts use a tool
- `fast` has a larger learning rate and newer packages, and is finished sooner
- `hacked` earns reward with ever longer answers, while its entropy collapses and trainer and engine part
- `crashed` ends in a failure
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis._demo_samples import Batch, Behaviour, make_samples, write_samples
from analysis._demo_text import write_tokenizer
from hpc.layout import RunLayout

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


def demo_runs(steps: int = 24) -> list[DemoRun]:
    """The runs that `write_demo` writes."""
    half = steps // 2
    return [
        DemoRun("baseline", ((0, half + 2), (half, steps)), Behaviour(speed=8)),
        DemoRun("fast", ((0, steps),), Behaviour(speed=14), lr=3e-5, torch="2.14.0"),
        DemoRun("hacked", ((0, steps),), Behaviour(speed=8, filler=9, collapse=True, drift=0.004)),
        DemoRun("crashed", ((0, max(3, steps // 4)),), Behaviour(speed=8), end="failed"),
    ]


def write_demo(
    root: Path, *, steps: int = 24, groups: int = 6, group_size: int = 8, seed: int = 0
) -> list[Path]:
    """Write all runs below `root`; returns their directories."""
    return [write_run(root / run.name, run, steps, groups, group_size, seed) for run in demo_runs(steps)]


def write_run(root: Path, run: DemoRun, steps: int, groups: int, group_size: int, seed: int) -> Path:
    """Write one run directory."""
    layout = RunLayout(root)
    root.mkdir(parents=True, exist_ok=True)
    layout.config.write_text(_config(run, steps, groups, group_size))
    packages = {"slurmlime": "0.1.0", "torch": run.torch, "sglang": "0.5.23"}
    identity = {"name": run.name, "created": "2025-06-15T15:06:40+00:00", "wandb_run_id": f"demo-{run.name}",
                "git_commit": "0" * 40, "python": "3.11.7", "packages": packages}  # fmt: skip
    layout.run_json.write_text(json.dumps(identity, indent=2) + "\n")
    write_tokenizer(root / "tokenizer")
    metrics: list[dict[str, Any]] = []
    events = [_event(START - 900, 0, "run_submitted", job_id="4711", resumed=False)]
    clock = START
    for attempt, (first, end) in enumerate(run.attempts):
        clock = _attempt(layout, run, attempt, range(first, end), steps, groups, group_size, seed, clock,
                         metrics, events)  # fmt: skip
    layout.metrics.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    layout.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    status = {"phase": events[-1]["state"], "step": metrics[-1]["step"] + 1, "num_rollout": steps,
              "attempt": len(run.attempts) - 1, "time": clock}  # fmt: skip
    layout.status.write_text(json.dumps(status) + "\n")
    return root


def _attempt(
    layout: RunLayout, run: DemoRun, attempt: int, todo: range, steps: int, groups: int, group_size: int,
    seed: int, clock: float, metrics: list[dict[str, Any]], events: list[dict[str, Any]],
) -> float:  # fmt: skip
    """Append an attempt's metrics and events, write its samples; returns the time of its end."""
    events.append(_event(clock, attempt, "attempt_started", host="node01"))
    for role in ("router", "rollout", "engine", "trainer"):
        clock += 12
        host = "node02" if role == "engine" else "node01"
        events.append(_event(clock, attempt, "role_ready", role=role, index=0, host=host))
    for step in todo:
        rng = random.Random(f"{seed} {run.name} {attempt} {step}")
        done = (step + 1) / steps
        batch = make_samples(rng, run.behaviour, done, step, groups, group_size, LIMIT)
        write_samples(layout.step_dir(step, attempt), batch, step, attempt, "train")
        seconds = _phases(rng, batch)
        clock += seconds["perf/step_s"]
        row = {"step": step, "attempt": attempt, "time": clock, **batch.metrics, **seconds,
               **_train_metrics(rng, run, batch, done, resumed=attempt > 0 and step == todo.start)}  # fmt: skip
        events.append(_event(clock, attempt, "weights_updated", role="trainer", version=step + 1))
        if (step + 1) % EVAL_INTERVAL == 0:
            row |= _evaluate(layout, run, attempt, step, steps, seed)
            events.append(_event(clock, attempt, "checkpoint_saved", role="trainer", step=step + 1))
        metrics.append(row)
    last = attempt == len(run.attempts) - 1
    if last and run.end == "failed":
        events.append(_event(clock + 1, attempt, "role_died", role="engine", index=0, exit_code=-9,
                             last_lines=["CUDA error: an illegal memory access was encountered"]))  # fmt: skip
    elif not last:
        events.append(_event(clock + 1, attempt, "stop_requested", reason="preempted"))
    state, code = (run.end, 0 if run.end == "finished" else 1) if last else ("stopped", 75)
    events.append(_event(clock + 5, attempt, "attempt_finished", state=state, exit_code=code))
    if not last:
        events.append(_event(clock + 6, attempt, "run_submitted", job_id="4711", resumed=True))
    return clock + 5 + (0 if last else 1800)


def _evaluate(
    layout: RunLayout, run: DemoRun, attempt: int, step: int, steps: int, seed: int
) -> dict[str, float]:
    rng = random.Random(f"{seed} eval {step}")
    batch = make_samples(rng, run.behaviour.honest(), (step + 1) / steps, step + 1, 20, 1, LIMIT)
    write_samples(layout.eval_dir("sums", step + 1, attempt), batch, step + 1, attempt, "sums")
    return {"eval/sums": batch.metrics["rollout/reward"],
            "eval/sums/response_length": batch.metrics["rollout/response_length"]}  # fmt: skip


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


def _train_metrics(
    rng: random.Random, run: DemoRun, batch: Batch, done: float, *, resumed: bool
) -> dict[str, float]:
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


def _event(time: float, attempt: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "attempt": attempt, "kind": kind, **fields}


def _config(run: DemoRun, steps: int, groups: int, group_size: int) -> str:
    return f"""[train]
hf_checkpoint = "tokenizer"
prompt_data = "data/train.jsonl"
actor_num_nodes = 1
actor_num_gpus_per_node = 4
rollout_num_gpus = 4
colocate = false
num_rollout = {steps}
rollout_batch_size = {groups}
n_samples_per_prompt = {group_size}
rollout_max_response_len = {LIMIT}
lr = {run.lr}
seed = 1234
wandb_project = "slurmlime"
wandb_team = "demo-team"
"""


def main(argv: list[str] | None = None) -> int:
    """Write the runs and say where they are."""
    description = "Write recorded runs to try the analysis on."
    parser = argparse.ArgumentParser(prog="python -m analysis.demo_data", description=description)
    parser.add_argument("directory", type=Path, help="directory that the runs are written below")
    parser.add_argument(
        "--steps", type=int, default=24, help="of a whole run, at least 8 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.steps < 8:
        parser.error("--steps must be at least 8")
    existing = [run.name for run in demo_runs() if (args.directory / run.name).exists()]
    if existing:
        print(
            f"error: {args.directory} already holds {', '.join(existing)}: choose another directory.",
            file=sys.stderr,
        )
        return 2
    for path in write_demo(args.directory, steps=args.steps, seed=args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
