"""`python -m analysis.sample RUN_DIR [--step N] [--best | --worst] [-n 3]`: read samples in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from analysis.frames.samples import chat_messages
from analysis.reading.errors import NotInRunError
from analysis.run import Run, load_run
from rltrain.run.errors import run_main
from rltrain.run.terminal import visible

MAX_CHARACTERS = 4000  # of one text; a screen or two

_COLUMNS = ["reward", "train_reward", "status", "failure", "prompt_length", "response_length",
            "weight_versions", "prompt", "response", "label"]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Print samples; 2 if there is no such run or step."""
    args = _parser().parse_args(argv)
    return run_main(lambda: _print_samples(args.run_dir, args.step, args.order, args.n))


def _print_samples(run_dir: Path, step: int | None, order: str | None, count: int) -> None:
    samples = pick(load_run(run_dir), step, order, count)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for _, row in samples.iterrows():
        print_sample(console, row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis.sample", description="Print samples of a run.")
    parser.add_argument("run_dir", type=Path, help="directory of the run, for example runs/demo")
    parser.add_argument("--step", type=int, help="step that generated them (default: the newest)")
    order = parser.add_mutually_exclusive_group()
    order.add_argument(
        "--best", dest="order", action="store_const", const="best", help="highest rewards first"
    )
    order.add_argument(
        "--worst", dest="order", action="store_const", const="worst", help="lowest rewards first"
    )
    parser.add_argument("-n", type=int, default=3, help="how many (default: %(default)s)")
    return parser


def pick(run: Run, step: int | None, order: str | None, count: int) -> pd.DataFrame:
    """`count` samples of `step` (None: the newest) in file order or, by reward, "best" or "worst" first.

    Raises:
        NotInRunError: the step, or the run, has no samples.
    """
    if step is None:
        if run.samples.empty:
            raise NotInRunError(f"{run.path} has no samples yet")
        step = int(run.samples["step"].max())
    samples = run.read_samples(_COLUMNS, steps=step)
    if order:
        samples = samples.sort_values("reward", ascending=order == "worst", kind="stable")
    return samples.head(count)


def print_sample(console: Console, row: pd.Series) -> None:
    """One sample: a heading, a line of numbers, prompt, response, label."""
    console.print(
        Rule(f"step {row['step']} · group {row['group_index']} · sample {row['index']}", style="dim")
    )
    console.print(Text(visible(_numbers(row)), style="bold"))
    if isinstance(row["failure"], str):
        console.print(Text(f"failed: {visible(row['failure'])}", style="red"))
    for title, text in [
        ("prompt", prompt_text(row["prompt"])),
        ("response", row["response"]),
        ("label", row["label"]),
    ]:
        if isinstance(text, str):
            console.print(Text(title, style="dim"))
            console.print(Padding(Text(clip(visible(text))), (0, 0, 0, 2)))
    console.print()


def _numbers(row: pd.Series) -> str:
    versions = list(dict.fromkeys(row["weight_versions"]))
    parts = [
        f"reward {row['reward']:.3g}",
        f"normalised {row['train_reward']:+.3g}" if pd.notna(row["train_reward"]) else "",
        str(row["status"]),
        f"prompt {row['prompt_length']} tokens",
        f"response {row['response_length']} tokens",
        f"weights {'→'.join(map(str, versions))}" if versions else "",
    ]
    return " · ".join(part for part in parts if part)


def prompt_text(prompt: Any) -> Any:
    """The prompt; if it is chat messages as JSON, one `role: content` paragraph a message."""
    messages = chat_messages(prompt)
    return prompt if messages is None else "\n".join(f"{role}: {content}" for role, content in messages)


def clip(text: str) -> str:
    """`text`, or its beginning and end if it is longer than `MAX_CHARACTERS`."""
    if len(text) <= MAX_CHARACTERS:
        return text
    head, tail = MAX_CHARACTERS * 3 // 4, MAX_CHARACTERS // 4
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"


if __name__ == "__main__":
    sys.exit(main())
