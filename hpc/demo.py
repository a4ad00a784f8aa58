"""The built-in demo: a tiny model learns to add, first from careless examples, then by reinforcement."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

from hpc import flags as flag_data
from hpc.config import SubmitOptions, read_request
from hpc.flags import Flags
from hpc.layout import RunLayout
from hpc.plan import make_plan
from hpc.run import describe, submit_run
from rltrain import arguments


def submit_demo(options: SubmitOptions) -> int:
    """Run the recipe `@demo-sft` as run `NAME-sft`, then `@demo` as run `NAME`; returns an exit code."""
    data = options.runs_dir / "demo-data"
    first = dataclasses.replace(options, name=f"{options.name}-sft")
    phases = [(first, _sft_flags(data, first.layout)), (options, _rl_flags(data, first.layout))]
    if options.dry_run:  # the second can't be checked before the first has run
        for phase, flags in phases:
            print(describe(phase, make_plan(arguments.parse(flag_data.to_argv(flags)))))
        return 0
    subprocess.run([sys.executable, "-m", "rltrain.demo.assets", str(data)], check=True)
    for phase, flags in phases:
        if code := submit_run(phase, flags):
            return code
    print("reward curve:", flush=True)
    subprocess.run([sys.executable, "-m", "analysis.plot", str(options.layout.root)], check=True)
    return 0


def _sft_flags(data: Path, layout: RunLayout) -> Flags:
    return _recipe("@demo-sft") | {
        "hf-checkpoint": [str(data / "model")],
        "prompt-data": [str(data / "sft.jsonl")],
        "save-hf": [str(layout.checkpoints / "hf")],
    }


def _rl_flags(data: Path, sft: RunLayout) -> Flags:
    return _recipe("@demo") | {
        "hf-checkpoint": [str(sft.checkpoints / "hf")],
        "prompt-data": [str(data / "train.jsonl")],
        "eval-prompt-data": ["addition", str(data / "eval.jsonl")],
    }


def _recipe(name: str) -> Flags:
    return read_request([name]).train
