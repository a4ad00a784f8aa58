"""Turn a run into a Slurm job: plan it against the cluster, render its script, submit it, write it down."""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hpc import config, run_dir
from hpc.ask import Ask, read_ask
from hpc.cluster import make_components, node_gpus
from hpc.config import SubmitOptions
from hpc.eventlog import append_event, replace_text
from hpc.feed import JsonLines
from hpc.layout import RunLayout
from hpc.plan import JobPlan, make_slurm_plan
from hpc.render import BatchScript
from hpc.restart import Limits, bad_nodes, save_lead
from hpc.runs import find_run, read_submissions
from hpc.shared_dir import check_run_dir
from hpc.slurm.client import SlurmClient, SlurmError
from hpc.slurm.facts import ClusterFacts, read_facts
from hpc.slurm_tables import Value
from hpc.split import Split, split_nodes
from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.arguments.fleet import read_models

if TYPE_CHECKING:
    from hpc.executor import SlurmlimeExecutor

Check = Callable[[argparse.Namespace], None]


@dataclass(frozen=True)
class SlurmJob:
    """A job that is planned and could be submitted.

    Attributes:
        flags: of training, as given.
        args: the same, resolved, with the split of nodes.
        facts: None if there is no Slurm here, which is enough to look at the script.
    """

    options: SubmitOptions
    flags: Flags
    args: argparse.Namespace
    split: Split
    plan: JobPlan
    script: BatchScript
    lead: int
    facts: ClusterFacts | None

    @property
    def executor(self) -> SlurmlimeExecutor:
        """What submits it."""
        from hpc.executor import SlurmlimeExecutor  # submitit takes its time

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
        check: looks at the input files, in place of `rltrain.arguments.check_inputs`.
        after_any: ids of jobs that must have ended, however they did.
        facts: the cluster, if it has been asked already.

    Raises:
        UserError: bad input, or an ask that the cluster can't meet.
    """
    facts = facts or ask_cluster(options)
    split = _split(options, flags, facts)
    components = make_components(split, options, facts)
    args = arguments.parse(flag_data.to_argv(flags | split.flags()))
    (check or arguments.check_inputs)(args)
    lead = save_lead(JsonLines(options.layout.metrics).read())
    whole = _whole_job_flags(options, lead, after_any)
    first, *others = [component.flags() for component in components]
    tables = options.slurm
    script = BatchScript((whole | first, *others), command="", env=tables.env, setup=tables.setup)
    plan = make_slurm_plan(args, split, tables.python or sys.executable)
    return SlurmJob(options, flags, args, split, plan, script, lead, facts)


def ask_cluster(options: SubmitOptions) -> ClusterFacts | None:
    """What the cluster has; None where a script is only looked at and there is no Slurm."""
    return None if options.dry_run and shutil.which("sbatch") is None else read_facts(SlurmClient())


def _split(options: SubmitOptions, flags: Flags, facts: ClusterFacts | None) -> Split:
    ask = _ask(options, flags)
    per_node = flags.get("num-gpus-per-node")
    given = int(per_node[0]) if per_node and per_node[0].isdigit() else None
    gpus = [node_gpus(options, facts, role, given) for role in ("trainer", "rollout")]
    return split_nodes(ask, *gpus)


def _ask(options: SubmitOptions, flags: Flags) -> Ask:
    """What the flags ask for; engines that differ in size are asked for in units that each is a multiple of."""
    external = flags.get("rollout-external-engine-addrs") or flags.get("rollout-external-engines-file")
    only_external = external and flags.get("rollout-num-gpus") is None
    has_engines = not {"debug-train-only", "load-debug-rollout-data"} & flags.keys() and not only_external
    ask = read_ask(flags, options.nodes, options.placement, has_engines)
    if not (file := flags.get("sglang-config")):
        return ask
    model = (flags.get("hf-checkpoint") or [""])[0]
    served = read_models(file[0], Namespace(hf_checkpoint=model, rollout_num_gpus_per_engine=ask.engine_size))
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
    if bad := bad_nodes(JsonLines(options.layout.events).read(), datetime.now(UTC).timestamp()):
        flags["exclude"] = ",".join(bad)
    return flags


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
    run_dir.prepare(layout, job.args, job.flags, config.to_table(job.options))
    return _send(job)


def submit_spare(options: SubmitOptions, before: str) -> str:
    """Submit a job that takes the run over when job `before` has ended, however it ended; returns the job's id.

    It ends at once if there is nothing left to do by then, or nothing that could be done.

    Raises:
        UserError: sbatch refuses it.
    """
    return _send(
        plan_job(replace(options, after=()), run_dir.stored_flags(options.layout), after_any=[before])
    )


def _send(job: SlurmJob) -> str:
    from hpc.slurm_supervisor import SlurmSupervisor

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
    submitted = job.executor.submit(supervisor)
    _write_down(job, submitted.job_id)
    return submitted.job_id


def refuse_second_job(layout: RunLayout) -> None:
    """Raise a UserError if a job of the run is waiting or running."""
    jobs = [each.job_id for each in read_submissions(layout) if each.layout != "local"]
    with contextlib.suppress(SlurmError):
        for record in SlurmClient().squeue(jobs[-1:]):
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
