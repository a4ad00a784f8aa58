"""Start or resume one run: check, plan, make the run directory, run the job and show it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from hpc import flags as flag_data
from hpc import run_dir
from hpc.config import SubmitOptions
from hpc.flags import Flags
from hpc.layout import RunLayout
from hpc.plan import JobPlan, make_plan
from rltrain import arguments
from rltrain.arguments import UserError

if TYPE_CHECKING:
    from hpc.local import LocalResult

EXIT_FINISHED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def submit_run(options: SubmitOptions, given: Flags) -> int:
    """Submit one run, new or resumed: the flags it has already, overridden by those given.

    Returns:
        the exit code: 0 finished, 130 interrupted, 1 failed.

    Raises:
        UserError: bad input; nothing has been started.
    """
    layout = options.layout
    flags = flag_data.merge(run_dir.stored_flags(layout), given)
    args = arguments.parse(flag_data.to_argv(flags))
    arguments.check_inputs(args)
    plan = make_plan(args)
    if options.dry_run:
        print(describe(options, plan))
        return EXIT_FINISHED
    if options.partition:
        refuse_slurm()
    if run_dir.is_finished(layout, args):
        print(
            f"{layout.name} has finished its {args.num_rollout} steps. A larger --num-rollout continues it."
        )
        return EXIT_FINISHED
    verb = "resuming" if layout.root.exists() else "starting"
    run_dir.prepare(layout, args, flags)
    why = "no Slurm on this machine" if shutil.which("sbatch") is None else "no --partition given"
    print(f"{why}: {verb} {layout.name} here, in {layout.root}", flush=True)
    return _run_here(layout, args, plan)


def describe(options: SubmitOptions, plan: JobPlan) -> str:
    """What would be run: the batch script or, on this machine, the command of every role."""
    if options.partition:
        return _script(options)
    return "\n".join(
        f"{process.name}: {shlex.join([*(f'{k}={v}' for k, v in process.env.items()), *process.argv])}"
        for process in plan.processes
    )


def _script(options: SubmitOptions) -> str:
    from hpc.render import render
    from hpc.supervisor import Supervisor

    submitit = options.layout.submitit
    return render(
        "job.sbatch.j2",
        name=options.name,
        partition=options.partition,
        nodes=options.nodes,
        output=submitit / "%j.log",
        stop_grace=round(Supervisor.stop_grace),
        command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(submitit)]),
    ).rstrip("\n")


def refuse_slurm() -> None:
    """Raise the UserError that says why a batch job can't be submitted from here."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "--partition asks for Slurm, but there is no sbatch on this machine's PATH. Submit from a Slurm login"
            " node (perhaps after `module load slurm`), or leave --partition out to run here."
        )
    raise UserError("this version does not submit to Slurm yet: add --dry-run to see the script.")


def _run_here(layout: RunLayout, args: Namespace, plan: JobPlan) -> int:
    # Imported late: neither --help nor --dry-run needs them.
    from hpc import local
    from hpc.summary import print_summary
    from hpc.supervisor import Supervisor
    from hpc.view import make_view

    view = make_view(layout, args.num_rollout)
    begun = time.monotonic()

    def on_stop(again: bool) -> None:
        view.say("stopping now" if again else "stopping: saving first (press Ctrl-C again to stop at once)")

    with view.shown():
        result = local.run(Supervisor(layout.root, plan), layout.submitit, view.refresh, on_stop)
    if result.error:
        print(f"error: {layout.name} failed: {result.error}", file=sys.stderr)
    elif _exit_code(result) == EXIT_INTERRUPTED:
        saved = result.report is not None and result.report["saved"]
        print(f"{layout.name} was stopped; it resumes from " + ("here." if saved else "its last checkpoint."))
    print_summary(layout, args.num_rollout, time.monotonic() - begun)
    return _exit_code(result)


def _exit_code(result: LocalResult) -> int:
    if result.error:
        return EXIT_FAILED
    finished = result.report is not None and result.report["state"] == "finished"
    return EXIT_FINISHED if finished else EXIT_INTERRUPTED
