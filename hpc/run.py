"""Start or resume one run: check, plan, make the run directory, run the job and show it."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hpc import run_dir
from hpc.config import SubmitOptions
from hpc.feed import JsonLines
from hpc.layout import RunLayout
from hpc.plan import JobPlan, make_plan
from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags

if TYPE_CHECKING:
    from hpc.local import LocalResult
    from hpc.slurm.client import JobStatus
    from hpc.slurm.facts import ClusterFacts
    from hpc.slurm_job import Check

EXIT_FINISHED, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def submit_run(
    options: SubmitOptions,
    given: Flags,
    check: Check | None = None,
    after_any: Sequence[str] = (),
    facts: ClusterFacts | None = None,
) -> int:
    """Submit one run, new or resumed: the flags it has already, overridden by those given.

    Args:
        options: where and how to run.
        given: training flags.
        check, after_any, facts: see `hpc.slurm_job.plan_job`.

    Returns:
        the exit code: 0 finished (or submitted, if the caller does not wait), 130 interrupted, 1 failed.

    Raises:
        UserError: bad input; nothing has been started.
    """
    if options.chain < 0 or (options.chain and not options.partition):
        raise UserError(
            f"--chain {options.chain}: a number of spare Slurm jobs, for a run that has a --partition."
        )
    flags = flag_data.merge(run_dir.stored_flags(options.layout), given)
    if options.partition:
        return _run_in_slurm(options, flags, check, after_any, facts)
    layout = options.layout
    args = arguments.parse(flag_data.to_argv(flags))
    arguments.check_inputs(args)
    plan = make_plan(args)
    if options.dry_run:
        print(describe(plan))
        return EXIT_FINISHED
    if _has_finished(layout, args):
        return EXIT_FINISHED
    verb = "resuming" if layout.root.exists() else "starting"
    run_dir.prepare(layout, args, flags)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run_dir.append_submission(layout, {"job_id": "local", "layout": "local", "submitted": now})
    why = "no Slurm on this machine" if shutil.which("sbatch") is None else "no --partition given"
    print(f"{why}: {verb} {layout.name} here, in {layout.root}", flush=True)
    return _run_here(options, args, plan)


def describe(plan: JobPlan) -> str:
    """The command of every role of a local run."""
    return "\n".join(
        f"{process.name}: {shlex.join([*(f'{k}={v}' for k, v in process.env.items()), *process.argv])}"
        for process in plan.processes
    )


def _has_finished(layout: RunLayout, args: Namespace) -> bool:
    if not run_dir.is_finished(layout, args):
        return False
    print(f"{layout.name} has finished its {args.num_rollout} steps. A larger --num-rollout continues it.")
    return True


def _run_in_slurm(
    options: SubmitOptions,
    flags: Flags,
    check: Check | None,
    after_any: Sequence[str],
    facts: ClusterFacts | None,
) -> int:
    from hpc.slurm_job import plan_job, submit_job, submit_spare

    layout = options.layout
    if shutil.which("sbatch") is None and not options.dry_run:
        raise UserError(
            "--partition asks for Slurm, but there is no sbatch on this machine's PATH. Submit from a Slurm login"
            " node (perhaps after `module load slurm`), or leave --partition out to run here."
        )
    job = plan_job(options, flags, check, after_any, facts)
    print(job.split.explain(), file=sys.stderr, flush=True)
    if options.dry_run:
        print(job.text(), end="")
        return EXIT_FINISHED
    if options.test_only:
        from hpc.executor import check_script

        print(check_script(job.text()))
        return EXIT_FINISHED
    if _has_finished(layout, job.args):
        return EXIT_FINISHED
    job_id = submit_job(job)
    print(f"submitted {layout.name} as job {job_id}; its script is {layout.script}", flush=True)
    before = job_id
    for number in range(1, options.chain + 1):
        spare = submit_spare(options, before)
        print(f"spare job {number} of {options.chain}: {spare}, after {before}", flush=True)
        before = spare
    if options.detach or options.chain:  # of a chain, what is shown would end with its first job
        return EXIT_FINISHED
    return _follow(layout, job_id, job.args.num_rollout)


def _follow(layout: RunLayout, job_id: str, num_rollout: int) -> int:
    from hpc.feed import read_status
    from hpc.follow import follow
    from hpc.slurm.client import SlurmClient
    from hpc.summary import print_summary
    from hpc.view import make_view

    begun = time.monotonic()
    status = follow(layout, job_id, make_view(layout, num_rollout), SlurmClient())
    name = f"{layout.name} --runs-dir {shlex.quote(str(layout.root.parent))}"
    if status is None:
        print(
            f"\njob {job_id} goes on. Look again: python -m hpc.logs -f {name}; end it: python -m hpc.cancel {name}"
        )
        return EXIT_FINISHED
    finished = read_status(layout).get("phase") == "finished"
    if not finished:
        print(f"error: {layout.name}: {why_it_ended(layout, status)}", file=sys.stderr)
    print_summary(layout, num_rollout, time.monotonic() - begun)
    return EXIT_FINISHED if finished else EXIT_FAILED


def why_it_ended(layout: RunLayout, status: JobStatus) -> str:
    """Why a job ended without finishing its run, and where to look."""
    ended = f"job {status.job} ended as {status.state}"
    events = [event for event in JsonLines(layout.events).read() if event.get("kind") == "attempt_finished"]
    output = sorted(layout.submitit.glob(f"{status.job}_*_log.err"))
    where = f"The output of its batch script: {output[-1]}." if output else "Its batch script has not begun."
    return f"{ended}. {events[-1]['reason'] if events else where}"


def _run_here(options: SubmitOptions, args: Namespace, plan: JobPlan) -> int:
    # Imported late: neither --help nor --dry-run needs them.
    from hpc import local
    from hpc.summary import print_summary
    from hpc.supervisor import Supervisor
    from hpc.view import make_view

    layout = options.layout
    view = make_view(layout, args.num_rollout)
    begun = time.monotonic()

    def on_stop(again: bool) -> None:
        view.say("stopping now" if again else "stopping: saving first (press Ctrl-C again to stop at once)")

    supervisor = Supervisor(layout.root, plan, max_engine_restarts=options.max_engine_restarts)
    with view.shown():
        result = local.run(supervisor, layout.submitit, view.refresh, on_stop)
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
