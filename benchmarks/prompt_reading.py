"""Reading and tokenising a JSONL prompt file in shuffled order, against a bare loop that holds the file in memory.

python benchmarks/prompt_reading.py

Ours keeps where each line begins, draws batches in the order of a shuffled epoch, and makes samples of them. The bare
loop parses every line into a list first, and then tokenises as many batches.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_model import make_model

from hpc.layout import RunLayout
from rltrain.arguments import parse
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rollout.setup import prepare_args

ROWS, CHARACTERS, BATCH, ROUNDS = 10_000, 400, 256, 3


def make_args(root: Path) -> argparse.Namespace:
    rng, prompts = random.Random(0), root / "prompts.jsonl"
    with prompts.open("w") as file:
        for i in range(ROWS):
            text = "".join(rng.choices("0123456789+-*= abcdefgh", k=CHARACTERS))
            file.write(json.dumps({"input": text, "label": str(i), "metadata": {"row": i}}) + "\n")
    args = parse(
        f"--hf-checkpoint {make_model(root / 'model', weights=False)} --prompt-data {prompts} --label-key label"
        f" --rm-type exact --num-rollout 1 --rollout-batch-size {BATCH} --rollout-shuffle".split()
    )
    prepare_args(args, RunLayout(root / "run"))
    return args


def ours(args: argparse.Namespace) -> None:
    source = RolloutDataSource(args)
    for _ in range(ROWS // BATCH):
        source.get_samples(BATCH)


def bare(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.hf_checkpoint)
    with Path(args.prompt_data).open() as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    for start in range(0, ROWS // BATCH * BATCH, BATCH):
        tokenizer([row["input"] for row in rows[start : start + BATCH]], add_special_tokens=False)[
            "input_ids"
        ]


def speed(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> float:
    began = time.perf_counter()
    work(args)
    return ROWS / (time.perf_counter() - began)


def peak_megabytes(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> float:
    tracemalloc.start()
    work(args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        args = make_args(Path(directory))
        size = Path(args.prompt_data).stat().st_size / 1e6
        rounds = [(speed(ours, args), speed(bare, args)) for _ in range(ROUNDS + 1)][1:]
        mine, theirs = (statistics.median(values) for values in zip(*rounds, strict=True))
        memory = peak_megabytes(ours, args), peak_megabytes(bare, args)
    print(
        f"prompt reading: ours / bare = {mine / theirs:.3f}; ours {mine:.0f} rows/s, bare {theirs:.0f}; peak memory"
        f" {memory[0]:.1f} MB against {memory[1]:.1f} MB; {ROWS} rows, {size:.0f} MB, {ROUNDS} rounds"
    )


if __name__ == "__main__":
    main()
