"""GRPO here and with TRL's GRPOTrainer: the same model, prompts, reward, batch, lengths, temperature and threads.

    python benchmarks/against_trl.py [--model demo] [--steps 6] [--rounds 3]
    python benchmarks/against_trl.py --model smollm2      # after prepare.py and make_prompts.py of examples/smollm2

Runs of both alternate. The first step of each is left out as warm-up, and so are start-up and the last checkpoint. TRL
is installed into an environment of its own below `.cache/`, with the same torch; it generates with transformers, as it
does without a GPU. Memory is the largest sum over a run's processes, of which shared pages count once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from analysis import load_run
from analysis.frames.steps import phase_seconds

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".cache" / "trl"
SMOLLM2 = ROOT / "data" / "smollm2"
REWARD = '''"""What both sides grade with."""


def grade(response: str, label: str) -> float:
    """The share of the response's characters that are the label."""
    return response.count(label) / max(1, len(response))


async def reward(args, sample) -> float:
    return grade(sample.response, sample.label)
'''


@dataclass(frozen=True)
class Settings:
    """What is the same for both.

    Attributes:
        model: Hugging Face directory.
        prompts: JSON lines of `prompt`, to which the chat template has been applied, and `label`.
        tokens: Of a response, at most.
        samples: Of a prompt.
        threads: For each process that computes.
    """

    model: str
    prompts: str
    reward_dir: str
    output: str
    steps: int
    prompts_a_step: int
    samples: int
    tokens: int
    lr: float
    threads: int


@dataclass(frozen=True)
class Measured:
    """Of one run: seconds are means over its steps but the first, memory is in bytes."""

    step: float
    generate: float
    memory: int
    first_reward: float
    last_reward: float
    length: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["demo", "smollm2"], default="demo")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: two at least, because the first is left out")
    if options.model == "smollm2" and not (SMOLLM2 / "train.jsonl").exists():
        parser.error(
            f"{SMOLLM2} is missing: run examples/smollm2/prepare.py and examples/smollm2/make_prompts.py first"
        )
    python = trl_python()
    if python is None:
        return
    ours, theirs = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="against-trl-") as directory:
            settings = prepare(options, Path(directory))
            theirs.append(run_trl(settings, python, Path(directory)))
            ours.append(run_ours(settings, Path(directory)))
    report(settings, ours, theirs)


def trl_python() -> Path | None:
    """The Python that has TRL; the environment is made if it is not there. None, and a line, where it can't be made."""
    python = ENVIRONMENT / "bin" / "python"
    if python.exists():
        return python
    making = ENVIRONMENT.with_name(f".trl-{os.getpid()}")
    print(f"making {ENVIRONMENT.relative_to(ROOT)}, with TRL", flush=True)
    constraints = ROOT / "requirements" / "constraints.txt"
    torch_version = torch.__version__.partition("+")[0]
    try:
        subprocess.run([sys.executable, "-m", "venv", making], check=True)
        install = ["-m", "pip", "install", "-q", "-c", constraints, "trl", f"torch=={torch_version}"]
        subprocess.run([making / "bin/python", *install], check=True)
        making.rename(ENVIRONMENT)
    except subprocess.CalledProcessError as error:
        print(f"nothing measured: the environment could not be made ({error})")
        return None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return python


def prepare(options: argparse.Namespace, directory: Path) -> Settings:
    """Model, prompts and reward below `directory`."""
    (directory / "reward.py").write_text(REWARD)
    is_demo = options.model == "demo"
    model, rows = demo_task(directory) if is_demo else smollm2_task()
    random.Random(0).shuffle(rows)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Settings(
        model=str(model), prompts=str(prompts), reward_dir=str(directory), output=str(directory / "trl"),
        steps=options.steps, prompts_a_step=4 if is_demo else 8, samples=8 if is_demo else 4,
        tokens=128 if is_demo else 48, lr=1e-3 if is_demo else 5e-6, threads=len(os.sched_getaffinity(0)),
    )  # fmt: skip


def demo_task(directory: Path) -> tuple[Path, list[dict[str, str]]]:
    """The demo's shape with random weights: responses of about 25 tokens, as each may be the last."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rltrain.demo.assets import prompt_rows, write_assets

    write_assets(directory / "demo")
    model = directory / "demo" / "model"
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32)
    weights.save_pretrained(model)
    return model, [{"prompt": row["input"], "label": "7"} for row in prompt_rows()["train.jsonl"]]


def smollm2_task() -> tuple[Path, list[dict[str, str]]]:
    """The prompts of `examples/smollm2`."""
    from transformers import AutoTokenizer

    model = SMOLLM2 / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (SMOLLM2 / "train.jsonl").read_text().splitlines()]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"],
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    return model, [{"prompt": text, "label": "e"} for text in texts]


def run_trl(settings: Settings, python: Path, directory: Path) -> Measured:
    asked, result = directory / "settings.json", directory / "trl.json"
    asked.write_text(json.dumps(asdict(settings)))
    program = ROOT / "benchmarks" / "peers" / "trl_grpo.py"
    memory = run([str(python), str(program), str(asked), str(result)], directory / "trl.log")
    seen: dict[str, Any] = json.loads(result.read_text())
    between = [later - earlier for earlier, later in zip(seen["ends"], seen["ends"][1:], strict=False)]
    return Measured(
        step=statistics.mean(between),
        generate=statistics.mean(seen["generate"][1:]),
        memory=memory,
        first_reward=seen["reward"][0],
        last_reward=seen["reward"][-1],
        length=statistics.mean(seen["length"]),
    )


def run_ours(settings: Settings, directory: Path) -> Measured:
    runs = directory / "runs"
    flags: dict[str, Any] = {
        "name": "ours", "runs-dir": runs, "hf-checkpoint": settings.model, "prompt-data": settings.prompts,
        "input-key": "prompt", "label-key": "label", "custom-rm-path": "reward.reward",
        "num-rollout": settings.steps, "rollout-batch-size": settings.prompts_a_step,
        "n-samples-per-prompt": settings.samples, "rollout-max-response-len": settings.tokens,
        "sglang-dtype": "float32", "sglang-max-total-tokens": 16384, "max-tokens-per-gpu": 8192,
        "lr": settings.lr, "weight-decay": 0.0,
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "hpc.submit", *argv, "--use-dynamic-batch-size", "--colocate"]
    memory = run(command, directory / "ours.log", settings.reward_dir)
    steps = load_run(runs / "ours").steps
    seconds = phase_seconds(steps).drop(columns="save").iloc[1:]
    rewards = steps["rollout/reward"]
    return Measured(
        step=float(seconds.sum(axis=1).mean()),
        generate=float(seconds["generate"].mean()),
        memory=memory,
        first_reward=float(rewards.iloc[0]),
        last_reward=float(rewards.iloc[-1]),
        length=float(steps["rollout/response_length"].mean()),
    )


def run(command: list[str], log: Path, *path: str) -> int:
    """Run a command to its end, and return the most memory that it and its children held together, in bytes.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "WANDB_MODE": "disabled"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        most = 0
        while process.poll() is None:
            most = max(most, sum(held(psutil.Process(process.pid))))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return most


def held(process: psutil.Process) -> Iterator[int]:
    """Bytes of memory of each process of a tree; each shared page is divided by those that share it."""
    with contextlib.suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                yield each.memory_full_info().pss


def report(settings: Settings, ours: list[Measured], theirs: list[Measured]) -> None:
    batch = settings.prompts_a_step * settings.samples
    print(
        f"{Path(settings.model).parent.name}: {settings.prompts_a_step} prompts × {settings.samples} samples of at most"
        f" {settings.tokens} tokens, fp32, {settings.threads} threads; {settings.steps - 1} steps measured,"
        f" {len(ours)} rounds"
    )
    print(f"{'':<9} samples/s   s/step  generation  the rest   memory   tokens   reward: first → last step")
    for name, runs in (("ours", ours), ("TRL", theirs)):
        step, generate, memory, first, last, length = (
            statistics.median(getattr(each, field) for each in runs)
            for field in ("step", "generate", "memory", "first_reward", "last_reward", "length")
        )
        print(
            f"{name:<9} {batch / step:9.2f} {step:8.2f} {generate:11.2f} {step - generate:9.2f}"
            f" {memory / 1e9:5.2f} GB {length:8.1f}   {first:.3f} → {last:.3f}"
        )
    ratios = sorted(other.step / own.step for own, other in zip(ours, theirs, strict=True))
    memory_ratio = statistics.median(each.memory for each in ours) / statistics.median(
        each.memory for each in theirs
    )
    print(f"ours is {statistics.median(ratios):.2f} x as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"memory: {memory_ratio:.2f} of TRL's")


if __name__ == "__main__":
    main()
