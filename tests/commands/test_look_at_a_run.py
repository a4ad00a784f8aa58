"""What a run shows of itself: failed and cut-off samples, times, GPU-hours, plots of many runs, doctor's thresholds."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import rich
from helpers.recorded_runs import steps_run
from helpers.run_files import make_run

from analysis import export, load_run, load_runs, metrics, plots
from hpc.planning.processes import JobPlan, RoleProcess
from hpc.runs.live_view import describe_step, panel
from hpc.runs.progress import RunState
from hpc.runs.summary import next_commands, summary_rows
from hpc.supervisor.causes import Cause, End
from hpc.supervisor.roles import RunningRole, describe_deaths, find_cause
from rltrain.run.files import append_event
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, write_table

ROW = {"step": 3, "attempt": 1, "rollout/reward": 0.5, "rollout/failed_ratio": 0.125, "rollout/truncated_ratio": 0.5,
       "rollout/tokens": 600.0, "perf/step_s": 3.0}  # fmt: skip


def test_failed_and_cut_off_samples_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = RunState()
    state.add_metrics(ROW)
    line = describe_step(ROW, 9, state)
    assert "12.5% failed  50.0% cut off" in line and "200 tokens/s" in line
    rich.print(panel("x", state, 9, 1.0))
    assert "12.5% failed, 50.0% cut off" in capsys.readouterr().out
    layout = make_run(tmp_path, "x", phase="stopped", steps=4, attempts=2)
    rows = dict(summary_rows(layout, state, 9, 60.0))
    assert rows["samples"] == "in the last step 12.5% failed, 50.0% cut off"
    assert rows["time"] == "1:00 in this attempt; the steps of all attempts took 0:03"
    commands = dict(next_commands(layout, True, 9))
    assert "analysis.doctor" in commands["doctor"] and "analysis.report" in commands["report"]
    fine = ROW | {"rollout/failed_ratio": 0.0, "rollout/truncated_ratio": 0.0}
    assert "failed" not in describe_step(fine, 9, state) and "cut off" not in describe_step(fine, 9, state)


def test_no_gpu_no_gpu_hours(tmp_path: Path) -> None:
    """An attempt says how many GPUs it had; a person's Ctrl-C is not a requeue."""
    config = "[train]\nactor_num_gpus_per_node = 2\nrollout_num_gpus = 2\n"
    layout = RunLayout(
        steps_run(tmp_path / "x", [{"step": 0, "attempt": 0, "time": 5.0, "perf/step_s": 5.0}], config)
    )
    plan = JobPlan((RoleProcess("trainer", 0, ("x",)), RoleProcess("engine", 0, ("x",))))
    append_event(layout.events, 0, "attempt_started", {"gpus": plan.gpus})
    append_event(layout.events, 0, "stop_requested", {"reason": "SIGINT received"})
    append_event(layout.events, 0, "attempt_finished", {"state": "stopped", "exit_code": 0})
    run = load_run(layout.root)
    assert run.gpus == 0 and run.attempts["gpu_hours"].tolist() == [0.0]
    assert run.attempts["state"].tolist() == ["CANCELLED"]
    assert metrics.cost(run)["productive_gpu_hours"] == 0.0
    ax = plots.gpu_hours(run)
    assert "nothing recorded yet" in [text.get_text() for text in ax.texts] and "nan" not in ax.get_title(
        loc="left"
    )
    seen = JobPlan(
        tuple(RoleProcess("engine", i, ("x",), {"CUDA_VISIBLE_DEVICES": f"{i},7"}) for i in range(2))
    )
    assert seen.gpus == 3 and JobPlan((), "het").gpus is None


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 20, 35])
def test_many_runs_in_one_view(tmp_path: Path, count: int) -> None:
    for i in range(count):
        steps_run(
            tmp_path / f"a-sweep-with-a-long-name-{i:02d}",
            [{"step": s, "rollout/reward": i + s} for s in range(4)],
        )
    steps_run(tmp_path / "sft", [{"step": 0, "train/loss": 1.0}])
    ax = plots.comparison(load_runs(tmp_path))
    ax.figure.canvas.draw()
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert len({str(line.get_color()) for line in lines}) == len(lines) == count
    assert "not recorded: sft" in ax.get_title(loc="left")
    legend = ax.get_legend().get_window_extent()
    picture, page = ax.get_window_extent(), ax.figure.bbox
    assert not legend.overlaps(picture) or legend.y0 >= picture.y1 - 8
    assert legend.x1 <= page.x1 + 1 and legend.y0 >= 0
    assert picture.width > 0.3 * page.width and picture.height > 0.5 * page.height
    plt.close("all")


def test_a_metric_that_no_run_has(tmp_path: Path) -> None:
    steps_run(tmp_path / "x", [{"step": 0, "train/loss": 1.0}])
    ax = plots.comparison(load_runs(tmp_path), "rollout/nothing")
    assert [text.get_text() for text in ax.texts] == ["nothing recorded yet"]


def groups_run(root: Path, rewards: list[list[float]], steps: int = 12, **row: float) -> Path:
    """A run whose steps all have these groups of rewards."""
    mean = sum(map(sum, rewards)) / sum(map(len, rewards))
    rows = [{"step": s, "rollout/reward": mean, "rollout/zero_std_ratio": 0.9, **row} for s in range(steps)]
    layout = RunLayout(steps_run(root, rows))
    flat = [reward for group in rewards for reward in group]
    groups = [g for g, group in enumerate(rewards) for _ in group]
    for step in range(steps):
        samples = [
            Sample(group_index=g, index=i, prompt="p", response="r", tokens=[1, 2], response_length=1)
            for i, g in enumerate(groups)
        ]
        table = samples_to_table(samples, step=step, attempt=0, dataset="train", rewards=flat)
        write_table(table, layout.step_dir(step, 0))
    return layout.root


@pytest.mark.parametrize(
    ("rewards", "advice"),
    [
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], "too hard"),  # sparse
        ([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]], "too easy"),
        ([[-1.0, -1.0], [-1.0, -1.0], [-1.0, 0.0]], "too hard"),  # signed
        ([[0.0, 0.0], [0.0, 0.0], [-5.0, 0.0]], "too easy"),
        ([[2.0, 2.0], [2.0, 2.0], [2.0, 400.0]], "too hard"),  # as long as the answer
        ([[5.0, 5.0], [5.0, 5.0], [0.0, 10.0]], "tell apart"),
    ],
)
def test_groups_of_equal_rewards_are_judged_by_the_range_of_the_run(
    rewards: list[list[float]], advice: str, tmp_path: Path
) -> None:
    found = {finding.name: finding for finding in load_run(groups_run(tmp_path / "x", rewards)).doctor()}
    assert advice in found["zero-std-groups"].advice


@pytest.mark.parametrize("scale", [0.01, 1.0, 1000.0])
def test_hacking_is_judged_by_the_range_of_the_run(scale: float, tmp_path: Path) -> None:
    rows = [
        {
            "step": s,
            "rollout/reward": scale * (s / 12 - 0.5),
            "rollout/response_length": 10.0,
            "eval/x": 0.1 * scale,
        }
        for s in range(12)
    ]
    found = {finding.name for finding in load_run(steps_run(tmp_path / "x", rows)).doctor()}
    assert "reward-hacking" in found
    flat = [row | {"rollout/reward": scale * (0.5 + 0.001 * row["step"])} for row in rows]
    layout = RunLayout(groups_run(tmp_path / "y", [[0.0, scale]]))
    layout.metrics.write_text("".join(json.dumps(row) + "\n" for row in flat))
    assert "reward-hacking" not in {finding.name for finding in load_run(layout.root).doctor()}


def test_shared_machines_have_no_idle_gpus(tmp_path: Path) -> None:
    rows = [{"step": s, "perf/step_s": 10.0, "perf/train_s": 9.5, "perf/generate_s": 0.5} for s in range(12)]
    layout = RunLayout(
        steps_run(tmp_path / "x", rows, "[train]\ncolocate = false\nactor_num_gpus_per_node = 1\n")
    )
    assert "idle-roles" in {finding.name for finding in load_run(layout.root).doctor()}
    append_event(layout.events, 0, "attempt_started", {"gpus": 0})  # roles that share cores
    assert "idle-roles" not in {finding.name for finding in load_run(layout.root).doctor()}


@pytest.mark.slow
def test_the_lines_of_the_readme(
    recorded_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each does what it says, as it stands there; `serve` and `hpc.evaluate` only get their words."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## Look at a run")[2].partition("\n## ")[0]
    lines = re.findall(r"^python -m (\S+)([^#\n]*)", section, re.MULTILINE)
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    asked: list[object] = []
    monkeypatch.setattr("analysis.serve.serve", lambda *words: asked.append(words))
    monkeypatch.setattr("hpc.evaluate.evaluate", lambda *words: asked.append(words) or 0)
    shutil.copytree(recorded_runs / "fast", tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    for module, words in lines:
        assert importlib.import_module(module).main(words.split()) in (0, None), module
    assert len(lines) == 7 and asked[0] == (Path("runs"), 0)
    assert asked[1][:3] == ("demo", 10, ["--eval-prompt-data", "hard", "hard.jsonl"])  # type: ignore[index]
    assert Path("samples.csv").stat().st_size > 1000
    assert code
    exec(code[1], names := {})  # the README's own
    assert names["run"].notes["text"].tolist() == ["right by luck"] and len(names["run"].evals)


def test_notes_on_samples(recorded_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded_runs / "fast", tmp_path / "fast")
    run = load_run(tmp_path / "fast")
    assert run.notes.empty
    run.note(5, "counts words \ud800", tags=["hack"])
    run.note(run.evals.iloc[0], "right by luck")
    notes = load_run(tmp_path / "fast").notes
    assert notes["text"].tolist() == ["counts words ?", "right by luck"]
    assert notes["index"].tolist() == [5, run.evals["index"].iloc[0]] and notes["dataset"].tolist() == [
        "train",
        "sums",
    ]
    assert notes["tags"].tolist() == [["hack"], []]
    for option in ("--csv", "--parquet"):
        assert export.main([str(run.path), "--frame", "notes", option, str(tmp_path / "notes")]) == 0
    with pytest.raises(ValueError, match="no training sample with index 123456"):
        run.note(123456, "nothing")


NOISE = ["/lib/x.py:3: UserWarning: a kernel is not there", "  warnings.warn("]


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["error: --lr: not a number.", *NOISE], "--lr: not a number"),
        (["Traceback (most recent call last):", "  raise", "ValueError: no such layer: 7", *NOISE],
         "ValueError: no such layer: 7"),
        (["[rank0]: Traceback (most recent call last):", "[rank0]: torch.OutOfMemoryError: of 3 GiB", *NOISE],
         "torch.OutOfMemoryError: of 3 GiB"),
        (["KeyError: 'a'", "During handling …", "RuntimeError: b"], "RuntimeError: b"),
        (["ValueError: first", "error: the role's own word"], "the role's own word"),
        (["OSError: [Errno 28] No space left on device"], "the disk is full"),
        (NOISE, None),
    ],
)  # fmt: skip
def test_the_cause_comes_before_the_lines_of_a_log(
    lines: list[str], cause: str | None, tmp_path: Path
) -> None:
    assert find_cause(lines) == cause
    log = tmp_path / "trainer-0.log"
    log.write_text("\n".join([*lines, *NOISE * 15]) + "\n")
    handle = SimpleNamespace(failed_log=lambda: log, poll=lambda: 1, end=lambda: End(Cause.CODE))
    role = RunningRole(RoleProcess("trainer", 0, ("x",)), handle)  # type: ignore[arg-type] # a process that is over
    first = describe_deaths([role]).splitlines()[0]
    assert first.startswith(
        f"trainer-0 exited with code 1: {cause}. Its log" if cause else "trainer-0 exited with code 1. Its"
    )
