"""Write `train.jsonl` and `eval.jsonl` of the tasks: the same files for the same seed, no question in both."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tasks import TASKS, Row, make_splits


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/smollm2"), help="default: %(default)s")
    parser.add_argument(
        "--train", type=int, default=64, help="training prompts a task (default: %(default)s)"
    )
    parser.add_argument("--eval", type=int, default=8, help="held-out prompts a task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    splits = [make_splits(task, [args.train, args.eval], args.seed) for task in TASKS]
    for name, lists in zip(["train", "eval"], zip(*splits, strict=True), strict=True):
        rows = [row for rows in lists for row in rows]
        random.Random(args.seed).shuffle(rows)
        write_jsonl(args.output / f"{name}.jsonl", rows)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
