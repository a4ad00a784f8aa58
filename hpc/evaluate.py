"""Evaluate a checkpoint of a run, also while it trains: `python -m hpc.evaluate demo --step 40`.

The checkpoint's weights are evaluated by a job of their own, as the run was submitted: on Slurm, or on this machine.
The run itself is only read. Its `evals` then have the samples: `dataset` is NAME/SET, `step` is the checkpoint's.
Flags given here override the run's, such as `--eval-prompt-data NAME FILE` and `--eval-temperature 0`.
An evaluation that was stopped resumes when you run the same command.
"""

from __future__ import annotations

import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpc import cli
from hpc.planning.request import SubmitOptions
from hpc.resubmit import merge_options
from hpc.runs.find import find_run
from hpc.submitting import resuming, run_dir
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout

EXAMPLE = "python -m hpc.evaluate demo --step 40 --eval-prompt-data hard hard.jsonl --name later"
EXIT_CODES = "exit codes: those of submit: 0 evaluated or submitted, 1 failed, 2 bad input, 130 interrupted"
NAME = "later"

_CHECKPOINT = re.compile(r"iter_(\d{7,})")
# What a run starts with, keeps, and reports elsewhere: none of it is the evaluation's.
_OF_TRAINING = (
    *("load", "ref-load", "ref-ckpt-step", "save", "save-hf", "critic-load", "critic-save", "num-epoch"),
    *("debug-train-only", "debug-rollout-only", "save-debug-rollout-data", "save-debug-train-data"),
    *("load-debug-rollout-data", "load-debug-rollout-data-subsample", "wandb-run-id", "use-tensorboard"),
    *("use-pytorch-profiler", "record-memory-history", "memory-snapshot-dir", "tensorboard-dir"),
)
# What an evaluation is.
_OWN = ("load", "ckpt-step", "finetune", "start-rollout-id", "num-rollout")


def evaluate(
    run: str | Path,
    step: int | None = None,
    flags: Sequence[str] = (),
    name: str = NAME,
    local: bool = False,
    runs_dir: str | Path = "runs",
) -> int:
    """Evaluate a checkpoint; returns the exit code of `submit`.

    Args:
        run: name or directory.
        step: of the checkpoint, the number of steps trained; None for the newest.
        flags: words of a command line of `submit` that override what the run has; no recipes.
        name: of the evaluation. The same name at several steps makes one curve.
        local: on this machine, wherever the run was.
        runs_dir: where runs lie.

    Raises:
        UserError: no such run or checkpoint, nothing to evaluate on, or bad input; nothing has been started.
    """
    from hpc.submitting.start_run import submit_run

    layout = find_run(run, Path(runs_dir))
    stored = _read_flags(layout)
    step = _choose_step(layout, step)
    words = [*flags, f"--name={name}-step-{step}", f"--runs-dir={layout.evaluations}"]
    options, given = merge_options(layout, words, local)
    changes = evaluation_flags(stored, given, resuming.checkpoint_directory(layout), step)
    _check_same(options, changes)
    options = replace(options, share=options.share or bool(layout.root.stat().st_mode & stat.S_IRGRP))
    code = submit_run(options, changes)
    if code == cli.EXIT_OK and not options.dry_run and not options.test_only:
        verb = "are" if is_finished(options.layout, 0) else "will be"
        print(f"the samples {verb} in the `evals` of {layout.name} as {name}/SET at step {step}", flush=True)
    return code


def evaluation_flags(stored: Flags, given: Flags, checkpoints: Path, step: int) -> Flags:
    """The training flags of an evaluation.

    Args:
        stored: of the run.
        given: that override them.
        checkpoints: directory of the run's checkpoints.
        step: which of them.

    Raises:
        UserError: there is nothing to evaluate on, or a flag that is not for evaluations.
    """
    if wrong := [key for key in given if key in (*_OF_TRAINING, *_OWN)]:
        raise UserError(
            f"--{wrong[0]}: an evaluation only looks at a checkpoint of the run, which --step names. Leave it out."
        )
    kept = {key: values for key, values in stored.items() if key not in _OF_TRAINING}
    if "eval-prompt-data" in given:  # these sets, and no others
        kept.pop("eval-config", None)
    if "eval-config" in given:
        kept.pop("eval-prompt-data", None)
    # The results are the run's, and not a run of their own at W&B.
    flags = flag_data.merge(kept, {"wandb-mode": ["disabled"]}, given)
    if not flags.get("eval-prompt-data") and not flags.get("eval-config"):
        raise UserError(
            "the run has no evaluation sets: give --eval-prompt-data NAME FILE, or --eval-config FILE."
        )
    weights: Flags = {"load": [str(checkpoints)], "ckpt-step": [str(step)], "finetune": []}
    return flag_data.merge(flags, weights, {"start-rollout-id": [str(step)], "num-rollout": ["0"]})


def _read_flags(layout: RunLayout) -> Flags:
    try:
        return run_dir.stored_flags(layout)
    except OSError as error:
        raise UserError(f"{layout.config} can't be read, so the run's flags are unknown: {error}.") from None


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint in a directory of checkpoints, ascending. Its name appears when it is complete."""
    found = (_CHECKPOINT.fullmatch(path.parent.name) for path in directory.glob("iter_*/manifest.json"))
    return sorted(int(match[1]) for match in found if match)


def _choose_step(layout: RunLayout, wanted: int | None) -> int:
    directory = resuming.checkpoint_directory(layout)
    there = saved_steps(directory)
    if not there:
        raise UserError(
            f"{layout.name} has no checkpoint in {directory} yet. --save-interval says how often it writes one."
        )
    if wanted is not None and wanted not in there:
        raise UserError(
            f"{layout.name} has no checkpoint of step {wanted}: there are those of {', '.join(map(str, there))}."
        )
    return there[-1] if wanted is None else wanted


def _check_same(options: SubmitOptions, flags: Flags) -> None:
    """An evaluation that is there goes on only as it began."""
    own = options.layout
    if changed := resuming.check_resume(options, _read_flags(own), flags):
        raise UserError(
            f"there is an evaluation in {own.root} already, with other flags ({', '.join(changed)}). Give this one"
            " another --name."
        )


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.evaluate", __doc__, EXAMPLE, EXIT_CODES)
    parser.usage = (
        "python -m hpc.evaluate RUN [--step K] [--name NAME] [--local] [--runs-dir DIR] [flags of submit …]"
    )
    parser.add_argument("run", metavar="RUN", help="name or directory")
    parser.add_argument("--step", type=int, metavar="K", help="of the checkpoint (default: the newest)")
    parser.add_argument("--name", default=NAME, metavar="NAME",
        help="of the evaluation; the same name at several steps makes one curve (default: %(default)s)")  # fmt: skip
    parser.add_argument("--local", action="store_true", help="on this machine, wherever the run was")
    cli.add_runs_dir(parser)
    args, flags = parser.parse_known_args(argv)
    return evaluate(args.run, args.step, flags, args.name, args.local, args.runs_dir)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
