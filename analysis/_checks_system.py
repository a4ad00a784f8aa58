"""What can go wrong with the machinery and be seen in a run's record; a check that lacks its data finds nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis import metrics
from analysis._findings import ERROR, NOTE, WARNING, Finding, ends, metric_of
from analysis._frames import phase_seconds

if TYPE_CHECKING:
    from analysis._run import Run


def failures(run: Run) -> Finding | None:
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
    )  # fmt: skip


def stale_weights(run: Run) -> Finding | None:
    """Samples come from weights that are many updates old."""
    age = metric_of(run, "rollout/staleness_mean")
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


def idle_roles(run: Run) -> Finding | None:
    """Trainers wait for engines, or the other way round, on GPUs of their own."""
    if run.config.get("train", {}).get("colocate", True):
        return None
    seconds = phase_seconds(run.steps).sum()
    total = seconds.sum()
    if not total:
        return None
    # Engines work while they generate, also where that overlaps with training.
    generating = float(metric_of(run, "perf/generate_s").sum() + metric_of(run, "perf/reward_s").sum())
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


def kl_spike_after_resume(run: Run) -> Finding | None:
    """The first step of a later attempt moves the policy far more than others do."""
    kl = metric_of(run, "train/ppo_kl").abs()
    trained = run.steps[run.steps["step"] >= 0]
    first = trained.groupby("attempt")["step"].min().iloc[1:]
    usual = float(kl.median()) if len(kl) else 0.0
    spikes = [(step, kl[step]) for step in first if step in kl.index and kl[step] > max(10 * usual, 1e-3)]
    if not spikes:
        return None
    step, value = spikes[0]
    return Finding(
        "kl-spike-after-resume", ERROR,
        f"train/ppo_kl is {value:.2g} in step {step}, the first after a restart, and {usual:.2g} usually",
        "policy_kl",
        "Check that optimizer state and weights come from the same checkpoint, and that the engines have its weights.",
    )  # fmt: skip


def steps_lost(run: Run) -> Finding | None:
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


def failed_run(run: Run) -> Finding | None:
    """The last attempt ended in a failure."""
    if run.attempts.empty or run.attempts["state"].iloc[-1] != "FAILED":
        return None
    return Finding(
        "failed-run", ERROR,
        f"attempt {run.attempts['attempt'].iloc[-1]} failed: {run.attempts['reason'].iloc[-1]}",
        "reward_curve",
        "Read the log of the role that died (python -m hpc.logs) and the event `role_died`.",
    )  # fmt: skip
