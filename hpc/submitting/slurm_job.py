"""Turn a run into a Slurm job: plan it against the cluster, render its script, submit it, write it down."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hpc.planning.job_plan import make_slurm_plan
from hpc.planning.nodes import Ask, ClusterFlags, Split, make_ask, read_cluster_flags, split_nodes
from hpc.planning.processes import JobPlan
from hpc.planning.request import SubmitOptions, to_table
from hpc.planning.sbatch_flags import check_time_for_a_step, make_components, node_gpus
from hpc.planning.script import BatchScript
from hpc.planning.slurm_tables import Value
from hpc.runs.find import find_run, read_submissions
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.facts import read_facts
from hpc.submitting import precision, run_dir
from hpc.submitting.run_dir import check_run_dir
from hpc.supervisor.restart import Limits, bad_nodes, can_be_spared, save_lead, step_seconds
from rltrain import arguments, inputs
from rltrain.arguments import flags as flag_data
from rltrain.arguments.config import Config
from rltrain.arguments.flags import Flags
from rltrain.arguments.fleet import read_models
from rltrain.run.errors import UserError
from rltrain.run.files import append_event, read_lines, replace_text
from rltrain.run.layout import RunLayout

if TYPE_CHECKING:
    from hpc.submitting.executor import SlurmlimeExecutor

Check = Callable[[Config], Config]


@dataclass(frozen=True)
class SlurmJob:
    """A job that is planned and could be submitted.

    Attributes:
        flags: of training, as given.
        config: the same, resolved, with the split of nodes.
        chosen: what the GPUs of the trainer decided, see `hpc.submitting.precision`.
        facts: None if there is no Slurm here, which is enough to look at the script.
    """

    options: SubmitOptions
    flags: Flags
    config: Config
    chosen: str
    split: Split
    plan: JobPlan
    script: BatchScript
    lead: int
    facts: ClusterFacts | None

    @property
    def executor(self) -> SlurmlimeExecutor:
        """The executor that submits it."""
        from hpc.submitting.executor import SlurmlimeExecutor  # importing submitit is slow

        return SlurmlimeExecutor(self.options.layout.submitit, self.script, self.options.template)

    def text(self) -> str:
        """The batch script, exactly as it would be submitted."""
        return self.executor.script()


def plan_job(
    options: SubmitOptions,
    flags: Flags,
    check: Check | None = None,
    after_any: Sequence[str] = (),
    facts: ClusterFacts | None = None,
) -> SlurmJob:
    """Plan a job; writes nothing.

    Args:
        options: what was asked of `submit`.
        flags: training flags.
        check: looks at the input files, in place of `rltrain.inputs.check_inputs`, and returns what that returns.
        after_any: ids of jobs that must have ended, however they did.
        facts: the cluster, if it has been asked already.

    Raises:
        UserError: bad input, or an ask that the cluster can't meet.
    """
    facts = facts or ask_cluster(options)
    split = _split(options, flags, facts)
    components = make_components(split, options, facts)
    config = (check or inputs.check_inputs)(arguments.parse(flag_data.to_argv(flags | split.flags())))
    gpus = precision.has_gpus(components[0], options.slurm)
    idle = components[0].gpus > 0 and not gpus
    config, chosen = precision.decide(config, options.layout, gpus=gpus, idle=idle)
    lead = save_lead(read_lines(options.layout.metrics))
    if facts is not None:
        needed = step_seconds(read_lines(options.layout.events), read_lines(options.layout.metrics))
        check_time_for_a_step(components, options, facts, lead, needed)
    whole = _whole_job_flags(options, lead, after_any)
    if bad := _nodes_to_exclude(options, facts, sum(component.nodes for component in components)):
        whole["exclude"] = ",".join(bad)
    first, *others = [component.flags() for component in components]
    tables = options.slurm
    script = BatchScript((whole | first, *others), command="", env=tables.env, setup=tables.setup)
    plan = make_slurm_plan(config.engines, config.debug, split, tables.python or sys.executable)
    return SlurmJob(options, flags, config, chosen, split, plan, script, lead, facts)


def ask_cluster(options: SubmitOptions) -> ClusterFacts | None:
    """Facts of the cluster; None where a script is only looked at and there is no Slurm."""
    return None if options.dry_run and shutil.which("sbatch") is None else read_facts(SlurmClient())


def _split(options: SubmitOptions, flags: Flags, facts: ClusterFacts | None) -> Split:
    given = read_cluster_flags(flags)
    gpus = [node_gpus(options, facts, role, given.num_gpus_per_node) for role in ("trainer", "rollout")]
    return split_nodes(_ask(options, given), *gpus)


def _ask(options: SubmitOptions, given: ClusterFlags) -> Ask:
    """The ask from the flags. If engines differ in size, it counts in the largest unit that divides them all."""
    ask = make_ask(given, options.nodes, options.placement)
    if given.sglang_config is None:
        return ask
    served = read_models(given.sglang_config, given.hf_checkpoint, ask.engine_size)
    groups = [group for each in served for group in each["groups"]]
    total = sum(group["num_gpus"] for group in groups)
    unit = math.gcd(*(group[key] for group in groups for key in ("num_gpus", "num_gpus_per_engine")))
    return replace(ask, rollout_gpus=total, engine_size=unit)


def _whole_job_flags(options: SubmitOptions, lead: int, after_any: Sequence[str]) -> dict[str, Value]:
    """Flags that hold for all components of the job."""
    flags: dict[str, Value] = {"job-name": options.name}
    given = {"account": options.account, "qos": options.qos, "time": options.time}
    flags |= {name: value for name, value in given.items() if value}
    flags["signal"] = f"B:USR2@{lead}"
    if "no-requeue" not in options.slurm.sbatch:
        flags["requeue"] = True
    after_ok = [_job_of(word, options) for word in options.after]
    dependencies = {"afterok": after_ok, "afterany": after_any}
    if wanted := [f"{kind}:{':'.join(jobs)}" for kind, jobs in dependencies.items() if jobs]:
        flags["dependency"] = ",".join(wanted)
    if after_ok:
        flags["kill-on-invalid-dep"] = "yes"
    return flags


def _nodes_to_exclude(options: SubmitOptions, facts: ClusterFacts | None, needed: int) -> list[str]:
    """Nodes that failed repeatedly, as many as the partition can do without."""
    bad = bad_nodes(read_lines(options.layout.events), datetime.now(UTC).timestamp())
    if not bad or facts is None or options.partition is None:
        return bad
    nodes = {node for name in options.partition.split(",") for node in facts.partition(name).nodes}
    return can_be_spared(bad, nodes, needed)


def _job_of(word: str, options: SubmitOptions) -> str:
    """A job id from one, or from a run."""
    if word.isdigit():
        return word
    jobs = [each for each in read_submissions(find_run(word, options.runs_dir)) if each.layout != "local"]
    if not jobs:
        raise UserError(
            f"--after {word}: this run has not been submitted to Slurm, so it has no job to wait for."
        )
    return jobs[-1].job_id


def submit_job(job: SlurmJob) -> str:
    """Submit it, and write down that it was; returns the job's id.

    Raises:
        UserError: sbatch refuses it, or the run has a job already.
    """
    layout = job.options.layout
    assert job.facts is not None
    check_run_dir(layout.root, job.facts)
    refuse_second_job(layout)
    run_dir.prepare(layout, job.config, job.flags, to_table(job.options), shared=job.options.share)
    return _send(job)


def submit_spare(options: SubmitOptions, before: str) -> str:
    """Submit a job that takes the run over when job `before` has ended, however it ended; returns the job's id.

    It ends at once if by then there is nothing left to do, or nothing that it could do.

    Raises:
        UserError: sbatch refuses it.
    """
    return _send(
        plan_job(replace(options, after=()), run_dir.stored_flags(options.layout), after_any=[before])
    )


def _send(job: SlurmJob) -> str:
    from hpc.supervisor.slurm_supervisor import SlurmSupervisor

    layout, tables = job.options.layout, job.options.slurm
    supervisor = SlurmSupervisor(
        layout.root,
        job.plan,
        stop_grace=job.lead - 10.0,
        max_engine_restarts=job.options.max_engine_restarts,
        srun=tables.srun,
        python=tables.python or sys.executable,
        limits=Limits(job.options.max_restarts, job.options.max_failures),
    )
    replace_text(layout.script, job.text())
    before = os.umask(0o022)
    os.umask(before | 0o022)  # a job refuses a pickle that others may have written
    try:
        submitted = job.executor.submit(supervisor)
    finally:
        os.umask(before)
    _write_down(job, submitted.job_id)
    return submitted.job_id


def refuse_second_job(layout: RunLayout, must_know: bool = False) -> None:
    """Raise a UserError if a job of the run is waiting or running. An unknown one is cancelled.

    Args:
        layout: of the run.
        must_know: raise one too if Slurm can't be asked; otherwise that is left to sbatch, which would fail as well.
    """
    from hpc.submitting.executor import end_lost_jobs

    with contextlib.suppress(SlurmError):
        for job in end_lost_jobs(layout.submitit):
            print(f"job {job} of an earlier submit, which had given it up, is cancelled", flush=True)
    jobs = [each.job_id for each in read_submissions(layout) if each.layout != "local"]
    try:
        records = SlurmClient().squeue(jobs[-1:])
    except SlurmError as error:
        if not must_know:
            return
        raise UserError(
            f"the run {layout.name} may have a job that waits or runs, {jobs[-1]}, and Slurm can't be asked: {error}."
            " Start it where Slurm answers, or begin another run with --name."
        ) from None
    for record in records:
        if not record.state.is_final:
            raise UserError(
                f"the run {layout.name} has job {jobs[-1]}, which is {record.state}. Wait for it, or end it: python"
                f" -m hpc.cancel {layout.name} --runs-dir {layout.root.parent}"
            )


def _write_down(job: SlurmJob, job_id: str) -> None:
    assert job.facts is not None
    layout = job.options.layout
    components = (
        [f"{job_id}+{i}" for i in range(len(job.script.components))] if job.split.layout == "het" else []
    )
    run_dir.append_submission(
        layout,
        {
            "job_id": job_id,
            "components": components,
            "cluster": job.facts.name,
            "layout": job.split.layout,
            "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
            "partitions": [flags.get("partition") for flags in job.script.components],
            "nodes": [int(str(flags["nodes"])) for flags in job.script.components],
        },
    )
    event = {"job_id": job_id, "components": list(job.plan.roles)}
    append_event(layout.events, max(layout.attempts(), default=-1) + 1, "job_submitted", event)
