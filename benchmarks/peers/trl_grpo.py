"""TRL's GRPOTrainer on the task of `benchmarks/against_trl.py`, which runs this with the Python that has TRL.

    python trl_grpo.py SETTINGS.json RESULT.json

Generation is transformers' own: TRL's other way, vLLM, needs a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Of `TrainerCallback`."""
        self.steps.append([time.perf_counter()])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Of `TrainerCallback`."""
        self.steps[-1].append(time.perf_counter())


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, settings["reward_dir"])
    from reward import grade

    torch.set_num_threads(settings["threads"])
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    generating = time_generation(model)
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, label, **_: [
            grade(text, of) for text, of in zip(completions, label, strict=True)
        ],
        args=GRPOConfig(
            output_dir=settings["output"], max_steps=settings["steps"], report_to="none", save_strategy="no",
            use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, seed=0, shuffle_dataset=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=settings["prompts_a_step"] * settings["samples"],
            num_generations=settings["samples"],
            max_completion_length=settings["tokens"], temperature=1.0, top_p=1.0, top_k=0, beta=0.0,
            learning_rate=settings["lr"], lr_scheduler_type="constant", weight_decay=0.0, loss_type="grpo",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    history = [row for row in trainer.state.log_history if "reward" in row]
    Path(sys.argv[2]).write_text(
        json.dumps(
            {
                "ends": [end for _, end in clock.steps],
                "seconds": [end - begin for begin, end in clock.steps],
                "generate": generating,
                "reward": [row["reward"] for row in history],
                "length": [row["completions/mean_length"] for row in history],
            }
        )
    )


def time_generation(model: Any) -> list[float]:
    """Seconds of each call of `model.generate`, filled in as it is called."""
    seconds: list[float] = []
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return generate(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    model.generate = timed
    return seconds


if __name__ == "__main__":
    main()
