"""The results of a run, and the exact commands for the next steps."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from hpc.cli import command, python_command, shown
from hpc.runs.live_view import clock, lost_samples
from hpc.runs.progress import RunFeed, RunState
from rltrain.run.finished import is_finished
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import visible

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "notebooks" / "1_read_a_run.ipynb"


def summary_rows(
    layout: RunLayout, state: RunState, num_rollout: int, seconds: float
) -> list[tuple[str, str]]:
    """Label and text of each line of the summary table."""
    done = max([*state.metrics, -1]) + 1
    rows = [
        ("run", str(layout.root)),
        ("state", f"{state.status.get('phase', 'never started')}, {len(layout.attempts())} attempt(s)"),
        ("steps", f"{done} of {num_rollout}") if num_rollout else ("weights", f"of step {done}"),
        ("time", clock(seconds) + _of_all_attempts(layout, state)),
    ]
    if state.steps and (lost := lost_samples(state.steps[-1])):
        rows.append(("samples", f"in the last step {', '.join(lost)}"))
    if state.unsaved:
        last = "none" if state.saved is None else f"the last one is of step {state.saved}"
        rows.append(("checkpoint", f"NOT SAVED: {state.unsaved} ({last})"))
    for label, metric in [("reward", "rollout/reward"), *((name, name) for name in state.eval_names)]:
        if values := state.series(metric):
            rows.append((label, f"{values[0]:.3f} → {values[-1]:.3f}"))
    if gaps := state.series("train/logprob_abs_diff"):
        rows.append(("log-prob gap", f"{gaps[0]:.1e} first, {gaps[-1]:.1e} last (trainer against engine)"))
    return rows


def _of_all_attempts(layout: RunLayout, state: RunState) -> str:
    """Behind the time of this attempt, that of the steps of all of them."""
    if len(layout.attempts()) < 2:
        return ""
    total = sum(step.get("perf/step_s", 0.0) for step in state.steps)
    return f" in this attempt; the steps of all attempts took {clock(total)}"


def next_commands(layout: RunLayout, finished: bool, num_rollout: int) -> list[tuple[str, str]]:
    """Next things to do, each with its command."""
    python = python_command()
    run = shlex.quote(str(shown(layout.root)))
    # `resubmit` and not `submit`: it goes on where the run was, and a job on Slurm must not begin anew on a login node.
    more = ("resume", command("resubmit", layout))
    if finished:
        more = ("train on", command("resubmit", layout, "--num-rollout", str(2 * num_rollout)))
    lab = f"SLURMLIME_RUN={run} {python} -m jupyter lab {shlex.quote(str(shown(NOTEBOOK)))}"
    if importlib.util.find_spec("jupyterlab") is None:
        lab = f"{python} -m pip install -q jupyterlab && {lab}"
    frame = "run.steps" if num_rollout else "run.evals"
    return [
        ("doctor", f"{python} -m analysis.doctor {run}"),
        *([("samples", f"{python} -m analysis.sample {run} --worst")] if num_rollout else []),
        ("report", f"{python} -m analysis.report {run}"),
        ("notebook", lab),
        ("pandas", f"{python} -c {_load_and(f'print({frame})', layout)}"),
        *([more] if num_rollout or not finished else []),
        ("logs", command("logs", layout)),
    ]


def _load_and(statement: str, layout: RunLayout) -> str:
    code = f"from analysis import load_run; run = load_run({str(shown(layout.root))!r}); {statement}"
    # Double quotes read better around Python's single ones, where the shell would leave the text alone.
    return shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'


def print_summary(layout: RunLayout, num_rollout: int, seconds: float) -> None:
    """Print both."""
    from rich.console import Console
    from rich.table import Table

    feed = RunFeed(layout)
    feed.poll()
    finished = is_finished(layout, num_rollout)
    # soft_wrap: a command that is broken over two lines can't be copied
    options: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    console = Console()
    table = Table(show_header=False)
    for row in summary_rows(layout, feed.state, num_rollout, seconds):
        table.add_row(*map(visible, row))
    console.print(table, soft_wrap=True)
    console.print("next:", **options)
    for label, line in next_commands(layout, finished, num_rollout):
        console.print(f"  {label + ':':9} {line}", **options)
