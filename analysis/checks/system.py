"""Checks of the machinery: each looks for one thing that goes wrong, and finds nothing where its data is missing."""

from __future__ import annotations

from analysis import metrics
from analysis.checks.findings import ERROR, NOTE, WARNING, Finding, ends
from analysis.frames.run import RunFrames
from analysis.frames.steps import metric, phase_seconds, resumed_at


def failures(run: RunFrames) -> Finding | None:
    """Samples whose generation or reward failed."""
    failed = run.samples[run.samples["status"] == "failed"]
    if len(failed) < 0.001 * max(len(run.samples), 1) or failed.empty:
        return None
    reason = failed["failure"].str.split("\n").str[0].mode()  # below it is the traceback
    return Finding(
        "failed-samples", WARNING if len(failed) > 0.05 * len(run.samples) else NOTE,
        f"{len(failed)} of {len(run.samples)} samples failed, mostly: {reason.iloc[0] if len(reason) else 'unknown'}",
        "reward_curve",
        "Read `failure` of these samples; a reward that times out needs more --reward-timeout or less work.",
        "status=failed&sort=-step",
    )  # fmt: skip


def stale_weights(run: RunFrames) -> Finding | None:
    """Samples come from weights that are many updates old."""
    age = metric(run.steps, "rollout/staleness_mean")
    if age.empty and run.layout:  # not recorded: look into the newest samples
        age = metrics.staleness(run, list(run.layout.sample_files())[-20:])["mean"].dropna()
    if age.empty or ends(age)[1] < 2:
        return None
    return Finding(
        "stale-weights", WARNING,
        f"the last samples were generated {ends(age)[1]:.1f} updates before they were trained on",
        "staleness",
        "Sync weights more often (--update-weights-interval), or use an off-policy correction.",
    )  # fmt: skip


def idle_roles(run: RunFrames) -> Finding | None:
    """Trainers wait for engines, or the other way round, on GPUs of their own."""
    shares_cores = len(run.attempts) and not run.gpus
    if run.config.get("train", {}).get("colocate", True) or shares_cores:
        return None
    seconds = phase_seconds(run.steps).sum()
    total = seconds.sum()
    if not total:
        return None
    # Engines work while they generate, also where that overlaps with training.
    generating = float(metric(run.steps, "perf/generate_s").sum() + metric(run.steps, "perf/reward_s").sum())
    waits = {"trainer": seconds["generate"] + seconds["reward"], "engine": max(total - generating, 0.0)}
    idle = max(waits, key=waits.__getitem__)
    busy, share = "engine" if idle == "trainer" else "trainer", waits[idle] / total
    if share < 0.7:
        return None
    return Finding(
        "idle-roles", NOTE,
        f"{share:.0%} of the time the {idle} GPUs wait for the {busy}s",
        "time_breakdown",
        f"Move GPUs from the {idle}s to the {busy}s, let rollouts run ahead with --max-staleness, or share the GPUs "
        "with --colocate.",
    )  # fmt: skip


def kl_spike_after_resume(run: RunFrames) -> Finding | None:
    """The first step of a later attempt moves the policy far more than others do."""
    kl = metric(run.steps, "train/ppo_kl").abs()
    usual = float(kl.median()) if len(kl) else 0.0
    spikes = [
        (step, kl[step])
        for _, step in resumed_at(run.steps)
        if step in kl.index and kl[step] > max(10 * usual, 1e-3)
    ]
    if not spikes:
        return None
    step, value = spikes[0]
    return Finding(
        "kl-spike-after-resume", ERROR,
        f"train/ppo_kl is {value:.2g} in step {step}, the first after a restart, and {usual:.2g} usually",
        "policy_kl",
        "Check that optimizer state and weights come from the same checkpoint, and that the engines have its weights.",
    )  # fmt: skip


def steps_lost(run: RunFrames) -> Finding | None:
    """Work done twice because an attempt ended between two checkpoints."""
    lost = metrics.lost_steps(run)
    if lost.empty:
        return None
    return Finding(
        "lost-steps", NOTE if len(lost) <= 2 else WARNING,
        f"{len(lost)} steps ({lost['perf/step_s'].sum():.0f} s) were lost and trained again",
        "time_breakdown",
        "Save more often (--save-interval), or give the job more time to save when it is told to stop.",
    )  # fmt: skip


def checkpoints_lost(run: RunFrames) -> Finding | None:
    """The newest checkpoint could not be written."""
    marks = run.events[run.events["kind"].isin(["checkpoint_saved", "checkpoint_failed"])]
    if marks.empty or marks["kind"].iloc[-1] != "checkpoint_failed":
        return None
    failed, last = marks[marks["kind"] == "checkpoint_failed"], marks.iloc[-1]
    return Finding(
        "checkpoints-lost", ERROR,
        f"the newest checkpoint could not be saved ({len(failed)} in all): {last.get('reason')}",
        "reward_curve",
        "Make room, or give another --save: without it the next attempt trains the steps since the last one again.",
    )  # fmt: skip


def failed_run(run: RunFrames) -> Finding | None:
    """The last attempt ended in a failure."""
    if run.attempts.empty or run.attempts["state"].iloc[-1] != "FAILED":
        return None
    return Finding(
        "failed-run", ERROR,
        f"attempt {run.attempts['attempt'].iloc[-1]} failed: {run.attempts['reason'].iloc[-1]}",
        "reward_curve",
        "Read the log of the role that died (python -m hpc.logs) and the event `role_died`.",
    )  # fmt: skip
