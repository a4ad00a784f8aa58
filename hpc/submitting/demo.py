"""The built-in demo: a tiny model learns to add, first from careless examples, then by reinforcement."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc.planning.job_plan import make_plan
from hpc.planning.request import SubmitOptions
from hpc.runs.find import read_submissions
from hpc.submitting.command_line import read_request
from hpc.submitting.start_run import EXIT_FINISHED, describe, follow_job, submit_run
from rltrain import arguments, inputs
from rltrain.arguments import flags as flag_data
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout


def submit_demo(options: SubmitOptions, given: Flags) -> int:
    """Run the recipe `@demo-sft` as run `NAME-sft`, then `@demo` as run `NAME`; returns an exit code.

    On one machine roles always share it, so `--colocate` (the only flag that may be `given`) is for Slurm.

    On Slurm these are two jobs; the second waits for the first.
    """
    data = options.runs_dir / "demo-data"
    first = dataclasses.replace(options, name=f"{options.name}-sft")
    sft, grpo = _sft_flags(data, first.layout), _rl_flags(data, first.layout)
    if not options.dry_run:
        subprocess.run([sys.executable, "-m", "rltrain.demo.assets", str(data)], check=True)
    if options.partition:
        return _submit_to_slurm(options, first, sft, grpo, data, given)
    if options.dry_run:  # the second can't be checked before the first has run
        for flags in (sft, grpo):
            print(describe(make_plan(arguments.parse(flag_data.to_argv(flags)))))
        return 0
    for phase, flags in [(first, sft), (options, grpo)]:
        if code := submit_run(phase, flags):
            return code
    print("reward curve:", end=" ", flush=True)
    subprocess.run([sys.executable, "-m", "analysis.plot", str(options.layout.root)], check=True)
    return 0


def _submit_to_slurm(
    options: SubmitOptions, first: SubmitOptions, sft: Flags, grpo: Flags, data: Path, given: Flags
) -> int:
    # The recipes are made for one machine; a tiny model wants one rank and one engine a node.
    small: Flags = dict.fromkeys(("colocate", "actor-num-gpus-per-node", "rollout-num-gpus"))
    small["num-gpus-per-node"] = ["1"]
    colocated = small | given
    if options.dry_run:  # what the scripts need is not written either
        return max(
            submit_run(job, flags, _no_check)
            for job, flags in [(first, sft | small), (options, grpo | colocated)]
        )
    if code := submit_run(dataclasses.replace(first, detach=True), sft | small):
        return code
    to_come = {str(first.layout.checkpoints / "hf"): str(data / "model")}
    after = () if options.test_only else (first.name,)
    check = functools.partial(inputs.check_inputs, to_come=to_come)
    second = dataclasses.replace(options, after=after, detach=True)
    if (
        (code := submit_run(second, grpo | colocated, check))
        or options.test_only
        or options.detach
        or options.chain
    ):
        return code
    return _follow_both([(first.layout, sft), (options.layout, grpo)])


def _follow_both(runs: Sequence[tuple[RunLayout, Flags]]) -> int:
    """Show one after the other; the exit code."""
    for layout, flags in runs:
        steps = int((flags["num-rollout"] or [""])[0])
        if is_finished(layout, steps):
            continue
        code = follow_job(layout, read_submissions(layout)[-1].job_id, steps)
        if code != EXIT_FINISHED:
            return code or EXIT_FINISHED
    return EXIT_FINISHED


def _no_check(config: Config) -> Config:
    """For files that are not there yet."""
    return config


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
