"""Reading and tokenising a JSONL prompt file in shuffled order, against a bare loop that holds the file in memory.

python benchmarks/rollout/prompt_reading.py

Ours keeps where each line begins, draws batches in the order of a shuffled epoch, and makes samples of them. The bare
loop parses every line into a list first, and then tokenises as many batches.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from rltrain.arguments.config import Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.tiny_model import make_model

from rltrain.arguments import parse
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rollout.service.server import prepare
from rltrain.run.layout import RunLayout

ROWS, CHARACTERS, BATCH, ROUNDS = 10_000, 400, 256, 3


def make_args(root: Path) -> Config:
    rng, prompts = random.Random(0), root / "prompts.jsonl"
    with prompts.open("w") as file:
        for i in range(ROWS):
            text = "".join(rng.choices("0123456789+-*= abcdefgh", k=CHARACTERS))
            file.write(json.dumps({"input": text, "label": str(i), "metadata": {"row": i}}) + "\n")
    config = parse(
        f"--hf-checkpoint {make_model(root / 'model', weights=False)} --prompt-data {prompts} --label-key label"
        f" --rm-type exact --num-rollout 1 --rollout-batch-size {BATCH} --rollout-shuffle".split()
    )
    return prepare(config, RunLayout(root / "run"))


def ours(config: Config) -> None:
    source = RolloutDataSource(config.namespace)
    for _ in range(ROWS // BATCH):
        source.get_samples(BATCH)


def bare(config: Config) -> None:
    tokenizer = load_tokenizer(config.model.hf_checkpoint)
    with Path(config.data.prompt_data).open() as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    for start in range(0, ROWS // BATCH * BATCH, BATCH):
        tokenizer([row["input"] for row in rows[start : start + BATCH]], add_special_tokens=False)[
            "input_ids"
        ]


def speed(work: Callable[[Config], None], config: Config) -> float:
    began = time.perf_counter()
    work(config)
    return ROWS / (time.perf_counter() - began)


def peak_megabytes(work: Callable[[Config], None], config: Config) -> float:
    tracemalloc.start()
    work(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = make_args(Path(directory))
        size = Path(config.data.prompt_data).stat().st_size / 1e6
        rounds = [(speed(ours, config), speed(bare, config)) for _ in range(ROUNDS + 1)][1:]
        mine, theirs = (statistics.median(values) for values in zip(*rounds, strict=True))
        memory = peak_megabytes(ours, config), peak_megabytes(bare, config)
    print(
        f"prompt reading: ours / bare = {mine / theirs:.3f}; ours {mine:.0f} rows/s, bare {theirs:.0f}; peak memory"
        f" {memory[0]:.1f} MB against {memory[1]:.1f} MB; {ROWS} rows, {size:.0f} MB, {ROUNDS} rounds"
    )


if __name__ == "__main__":
    main()
