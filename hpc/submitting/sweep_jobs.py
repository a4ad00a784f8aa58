"""Submit the runs of a sweep: all of them are planned before the first one is submitted."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence

from hpc import cli
from hpc.planning.request import Request, SubmitOptions
from hpc.runs.find import read_submissions
from hpc.runs.slurm_jobs import ask_slurm, is_alive
from hpc.submitting import run_dir
from hpc.submitting.command_line import read_request, refuse_without_partition
from hpc.submitting.start_run import submit_run
from hpc.submitting.sweep import Variant, read_variants
from rltrain import arguments, inputs
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.run.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError
from rltrain.run.terminal import safe_text


def submit_sweep(argv: list[str], whole: Request) -> int:
    """Submit every run of the sweep in the command line `argv`, which reads as `whole`; returns an exit code.

    On this machine they run one after the other. A run that is finished, or has a job, is left as it is.

    Raises:
        UserError: bad input in one of them; nothing has been started.
    """
    options = whole.options
    if not whole.train:
        raise UserError("--sweep needs a recipe, or training flags: the built-in demo is one run.")
    variants = read_variants(options.sweep, options.name)
    requests = [read_request(argv, _last_word(variant)) for variant in variants]
    for request in requests:
        refuse_without_partition(argv, request.options)
    if options.partition:
        code = _on_slurm(variants, requests, options.sweep_parallel or len(variants))
    else:
        code = _here(variants, requests)
    if not options.dry_run and not options.test_only:
        where = shlex.quote(str(cli.shown(options.runs_dir)))
        print(
            f"{len(variants)} runs: {cli.python_command()} -m hpc.status '{options.name}.*' --runs-dir {where}"
        )
    return code


def _last_word(variant: Variant) -> Flags:
    return {**variant.flags, "name": [variant.name], "sweep": None, "sweep-parallel": None}


def _here(variants: Sequence[Variant], requests: Sequence[Request]) -> int:
    for request in requests:
        config = arguments.parse(flag_data.to_argv(_all_flags(request)))
        inputs.check_inputs(config)
    code = 0
    for variant, request in zip(variants, requests, strict=True):
        print(f"# {variant.name}: {variant}", flush=True)
        ended = submit_run(request.options, request.train)
        if ended == EXIT_INTERRUPTED:
            return ended
        code = max(code, ended)
    return code


def _on_slurm(variants: Sequence[Variant], requests: Sequence[Request], parallel: int) -> int:
    """Submit each as a job; job i waits until job i - `parallel` has ended, however it did."""
    from hpc.submitting.slurm_job import ask_cluster, plan_job

    facts = ask_cluster(requests[0].options)
    for request in requests:
        plan_job(request.options, _all_flags(request), facts=facts)
    before: list[list[str]] = [[] for _ in range(parallel)]
    code = 0
    for number, (variant, request) in enumerate(zip(variants, requests, strict=True)):
        options = dataclasses.replace(request.options, detach=True)
        print(f"# {variant.name}: {variant}", flush=True)
        if job := _active_job(options):
            print(f"{options.name} has a job already: {job}", flush=True)
            before[number % parallel] = [job]
            continue
        try:
            code = max(
                code, submit_run(options, request.train, after_any=before[number % parallel], facts=facts)
            )
        except UserError as error:  # sbatch refuses it: no reason to leave out the others
            print(f"error: {safe_text(str(error))}", file=sys.stderr)
            code = EXIT_USAGE
        before[number % parallel] = _last_job(options) or before[number % parallel]
    return code


def _all_flags(request: Request) -> Flags:
    """The flags, merged with the flags of an existing run of this name."""
    return flag_data.merge(run_dir.stored_flags(request.options.layout), request.train)


def _active_job(options: SubmitOptions) -> str | None:
    """The run's job that runs or waits, if it has one."""
    if options.dry_run or options.test_only or not read_submissions(options.layout):
        return None
    jobs = [each for each in read_submissions(options.layout) if each.layout != "local"]
    slurm = ask_slurm(jobs[-1:])
    return next((each.job_id for each in jobs[-1:] if is_alive(each, slurm)), None)


def _last_job(options: SubmitOptions) -> list[str]:
    jobs = [each.job_id for each in read_submissions(options.layout) if each.layout != "local"]
    return jobs[-1:]
