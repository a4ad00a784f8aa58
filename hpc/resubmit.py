"""Submit a run again, with its options and flags: after a final preemption, a time limit or a stop.

It goes on from its last checkpoint, where it ran before: as a new Slurm job, or on this machine. Flags given here
override those that it has, as for `submit`. `--chain N` also submits N spare jobs on Slurm, each of which takes over
when the one before it has ended; the rest of them end at once when the run is finished.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from hpc import cli
from hpc.planning.request import SubmitOptions
from hpc.runs.find import find_run, read_run
from hpc.runs.slurm_jobs import ask_slurm
from hpc.runs.state import to_status
from hpc.submitting.command_line import read_request, refuse_without_partition, stored_options
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

EXAMPLE = "python -m hpc.resubmit demo --time 12:00:00 --chain 3 --detach"
EXIT_CODES = "exit codes: those of submit: 0 finished or submitted, 1 failed, 2 bad input, 130 interrupted"

# These belong to one submission and are not taken over from the last one.
_OF_THE_CALL = ("after", "detach", "test_only", "dry_run", "sweep", "sweep_parallel")


def resubmit(
    run: str | Path,
    flags: Sequence[str] = (),
    chain: int = 0,
    local: bool = False,
    runs_dir: str | Path = "runs",
) -> int:
    """Submit a run again; returns the exit code of `submit`.

    Args:
        run: name or directory.
        flags: words of a command line of `submit` that override what the run has; no recipes.
        chain: number of spare jobs.
        local: on this machine, wherever it ran before.
        runs_dir: where runs lie.

    Raises:
        UserError: it runs or waits already, or bad input; nothing has been started.
    """
    from hpc.submitting.start_run import submit_run

    layout = find_run(run, Path(runs_dir))
    refuse_active(layout)
    options, train = merge_options(layout, list(flags), local)
    return submit_run(dataclasses.replace(options, chain=chain), train)


def refuse_active(layout: RunLayout) -> None:
    """Raise a UserError if the run runs or waits, or if that can't be known."""
    record = read_run(layout)
    slurm = ask_slurm(record.slurm_jobs)
    if slurm.problem:
        raise UserError(
            f"{layout.name} may have a job that is alive, and Slurm can't be asked: {slurm.problem}"
        )
    status = to_status(record, slurm)
    if status.is_active:
        where = f"as job {status.job_id}" if status.slurm_state else "on this machine"
        raise UserError(
            f"{layout.name} is {status.state} {where}, so it cannot be resubmitted. To stop it:"
            f" {cli.command('cancel', layout)}"
        )


def merge_options(layout: RunLayout, words: list[str], local: bool = False) -> tuple[SubmitOptions, Flags]:
    """Options for a new submission, those given replacing those that the run has; and the training flags given.

    Raises:
        UserError: unknown flags, recipes, or options of Slurm jobs for a run of this machine.
    """
    recipes, given = flag_data.split(words)
    if recipes:
        raise UserError(
            f"@{recipes[0]}: a run keeps its flags, so recipes are not accepted here; give flags."
        )
    request = read_request([f"--name={layout.name}", f"--runs-dir={layout.root.parent}", *words])
    named = {"slurm" if name.startswith("slurm.") else name.replace("-", "_") for name in given}
    fields = {field.name for field in dataclasses.fields(SubmitOptions)} & {*named, *_OF_THE_CALL}
    changes = {name: getattr(request.options, name) for name in fields}
    options = dataclasses.replace(stored_options(layout), **changes)
    options = dataclasses.replace(options, partition=None) if local else options
    refuse_without_partition(words, options)
    return options, request.train


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.resubmit", __doc__, EXAMPLE, EXIT_CODES)
    parser.usage = "python -m hpc.resubmit RUN [--chain N] [--local] [--runs-dir DIR] [flags of hpc.submit …]"
    parser.add_argument("run", metavar="RUN", help="name or directory")
    parser.add_argument(
        "--chain", type=int, default=0, metavar="N", help="number of spare jobs (Slurm; default: none)"
    )
    parser.add_argument("--local", action="store_true", help="on this machine, wherever it ran before")
    cli.add_runs_dir(parser)
    args, flags = parser.parse_known_args(argv)
    return resubmit(args.run, flags, args.chain, args.local, args.runs_dir)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
