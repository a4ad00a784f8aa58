"""Start or resume one run: check, plan, make the run directory, run the job and show it."""

from __future__ import annotations

import errno
import os
import select
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hpc.gpus import usable_gpus
from hpc.planning.job_plan import make_plan
from hpc.planning.processes import JobPlan
from hpc.planning.request import SubmitOptions, to_table
from hpc.runs.find import LOCAL, read_submissions
from hpc.submitting import precision, resuming, run_dir
from rltrain import arguments, inputs
from rltrain.arguments import flags as flag_data
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.arguments.groups.rollout import Rollout
from rltrain.run.errors import EXIT_INTERRUPTED, UserError
from rltrain.run.files import read_lines
from rltrain.run.finished import finished_steps, is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import safe_text

if TYPE_CHECKING:
    from hpc.slurm.client import JobStatus
    from hpc.slurm.cluster import ClusterFacts
    from hpc.submitting.local_job import LocalResult
    from hpc.submitting.slurm_job import Check

EXIT_FINISHED, EXIT_FAILED = 0, 1


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
        check, after_any, facts: see `hpc.submitting.slurm_job.plan_job`.

    Returns:
        the exit code: 0 finished (or submitted, if the caller does not wait), 130 interrupted, 1 failed.

    Raises:
        UserError: bad input; nothing has been started.
    """
    if options.chain < 0 or (options.chain and not options.partition):
        raise UserError(
            f"--chain {options.chain}: a number of spare Slurm jobs, for a run that has a --partition."
        )
    before = run_dir.stored_flags(options.layout, " A new run needs another --name.")
    flags = flag_data.merge(before, given)
    changes = resuming.check_resume(options, before, flags)
    if changes and not options.dry_run:
        print(f"changed since the last start: {', '.join(changes)}", file=sys.stderr, flush=True)
    if options.partition:
        return _run_in_slurm(options, flags, check, after_any, facts)
    layout = options.layout
    config = inputs.check_inputs(arguments.parse(flag_data.to_argv(flags)))
    inputs.check_imports(config)
    gpus = usable_gpus()
    config, chosen = precision.decide(config, layout, gpus=bool(gpus))
    _say(config, flags, chosen)
    plan = make_plan(config, gpus=[gpu.name for gpu in gpus])
    if options.dry_run:
        print(describe(plan))
        return EXIT_FINISHED
    if _has_finished(layout, config.rollout):
        return EXIT_FINISHED
    if any(each.layout != LOCAL for each in read_submissions(layout)):
        from hpc.submitting.slurm_job import refuse_second_job

        refuse_second_job(layout, must_know=True)  # it would meet this run in its directory
    verb = "resuming" if layout.root.exists() else "starting"
    run_dir.prepare(layout, config, flags, to_table(options), shared=options.share)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run_dir.append_submission(layout, {"job_id": "local", "layout": "local", "submitted": now})
    why = "no Slurm on this machine" if shutil.which("sbatch") is None else "no --partition given"
    print(f"{why}: {verb} {layout.name} here, in {layout.root}", flush=True)
    return _run_here(options, config.rollout, plan)


def _say(config: Config, flags: Flags, chosen: str) -> None:
    """What was made of the flags, where that may not be what their author expects."""
    lines = [*arguments.remarks(config), *filter(None, [chosen])]
    if flags.get("actor-num-gpus-per-node") is None and not config.debug.debug_rollout_only:
        lines.append("--actor-num-gpus-per-node is not given: one trainer rank here (slime takes 8)")
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def describe(plan: JobPlan) -> str:
    """The command of every role of a local run."""
    return "\n".join(
        f"{process.name}: {shlex.join([*(f'{k}={v}' for k, v in process.env.items()), *process.argv])}"
        for process in plan.processes
    )


def _has_finished(layout: RunLayout, rollout: Rollout) -> bool:
    if not is_finished(layout, rollout.num_rollout):
        return False
    if rollout.num_rollout:
        done = f"has finished its {finished_steps(layout)} steps. A larger --num-rollout continues it."
    else:
        done = "has evaluated its weights."
    print(f"{layout.name} {done}")
    return True


def _run_in_slurm(
    options: SubmitOptions,
    flags: Flags,
    check: Check | None,
    after_any: Sequence[str],
    facts: ClusterFacts | None,
) -> int:
    from hpc.submitting.slurm_job import plan_job, submit_job, submit_spare

    layout = options.layout
    if shutil.which("sbatch") is None and not options.dry_run:
        raise UserError(
            "--partition asks for Slurm, but there is no sbatch on this machine's PATH. Submit from a Slurm login"
            " node (perhaps after `module load slurm`), or leave --partition out to run here."
        )
    job = plan_job(options, flags, check, after_any, facts)
    print(job.split.explain(), file=sys.stderr, flush=True)
    absent = [
        f"the job's machines need what is missing here: {line}" for line in inputs.absent_imports(job.config)
    ]
    for line in [*arguments.remarks(job.config), *filter(None, [job.chosen]), *absent]:
        print(line, file=sys.stderr, flush=True)
    if options.dry_run:
        print(job.text(), end="")
        return EXIT_FINISHED
    if options.test_only:
        from hpc.submitting.executor import check_script

        print(check_script(job.text()))
        return EXIT_FINISHED
    if _has_finished(layout, job.config.rollout):
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
    return follow_job(layout, job_id, job.config.rollout.num_rollout) or EXIT_FINISHED


def follow_job(layout: RunLayout, job_id: str, num_rollout: int) -> int | None:
    """Show a run until its Slurm job is over; returns the exit code, or None if the person stopped looking."""
    from hpc.runs.live_view import follow, make_view
    from hpc.runs.summary import print_summary
    from hpc.slurm.client import SlurmClient

    begun = time.monotonic()
    status = follow(layout, job_id, make_view(layout, num_rollout), SlurmClient())
    name = f"{layout.name} --runs-dir {shlex.quote(str(layout.root.parent))}"
    if status is None:
        print(
            f"\njob {job_id} keeps running. Look again: python -m hpc.logs -f {name}; end it: python -m hpc.cancel"
            f" {name}"
        )
        return None
    finished = is_finished(layout, num_rollout)
    if not finished:
        print(f"error: {layout.name}: {safe_text(why_it_ended(layout, status))}", file=sys.stderr)
    print_summary(layout, num_rollout, time.monotonic() - begun)
    return EXIT_FINISHED if finished else EXIT_FAILED


def why_it_ended(layout: RunLayout, status: JobStatus) -> str:
    """Why a job ended without finishing its run, and where to look."""
    ended = f"job {status.job} ended as {status.state}"
    events = [event for event in read_lines(layout.events) if event.get("kind") == "attempt_finished"]
    output = sorted(layout.submitit.glob(f"{status.job}_*_log.err"))
    where = f"The output of its batch script: {output[-1]}." if output else "Its batch script has not begun."
    return f"{ended}. {events[-1]['reason'] if events else where}"


def _run_here(options: SubmitOptions, rollout: Rollout, plan: JobPlan) -> int:
    # Imported late: neither --help nor --dry-run needs them.
    from hpc.runs.live_view import make_view
    from hpc.runs.summary import print_summary
    from hpc.submitting import local_job
    from hpc.supervisor.supervisor import Supervisor

    layout = options.layout
    view = make_view(layout, rollout.num_rollout)
    begun = time.monotonic()

    def refresh() -> None:
        _unless_unseen(view.refresh)

    def on_stop(again: bool) -> None:
        text = "stopping now" if again else "stopping: saving first (press Ctrl-C again to stop at once)"
        _unless_unseen(lambda: view.say(text))

    supervisor = Supervisor(layout.root, plan, max_engine_restarts=options.max_engine_restarts)
    with view.shown():
        result = local_job.run(supervisor, layout.submitit, refresh, on_stop)
    if result.error:
        text = f"error: {layout.name} failed: {safe_text(result.error)}"
        _unless_unseen(lambda: print(text, file=sys.stderr))
    elif _exit_code(result) == EXIT_INTERRUPTED:
        saved = result.report is not None and result.report["saved"]
        goes_on = "resumes from here" if saved else "resumes from its last checkpoint"
        if not saved and not resuming.has_checkpoint(layout):
            goes_on = "begins anew, because it has no checkpoint yet"
        print(f"{layout.name} was stopped; it {goes_on}.")
    print_summary(layout, rollout.num_rollout, time.monotonic() - begun)
    return _exit_code(result)


def _unless_unseen(show: Callable[[], None]) -> None:
    """Show something. If no reader is left, show nothing from now on.

    A run must not die, unsaved, of a terminal that was closed or of a Ctrl-C that ended the `tee` behind it first.
    """
    try:
        show()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            if _has_no_reader(stream.fileno()):
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _has_no_reader(descriptor: int) -> bool:
    """Whether the other end of a pipe or terminal is gone; never so for a file, whose disk may work again."""
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in asked.poll(0))


def _exit_code(result: LocalResult) -> int:
    if result.error:
        return EXIT_FAILED
    finished = result.report is not None and result.report["state"] == "finished"
    return EXIT_FINISHED if finished else EXIT_INTERRUPTED
