"""The whole product on its real parts: the demo (the whole of it learns), and runs that are stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pandas as pd
import pytest
from helpers.local_job import OPEN_PATHS, OPEN_TO_ALL, Seen, look_at, own_addresses, wait_until
from helpers.run_files import lines_of

from analysis import Run, load_run
from rltrain.demo.assets import write_assets

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]


def submit(*flags: str, timeout: float = 900, verb: str = "submit") -> subprocess.CompletedProcess[str]:
    """Run `python -m hpc.submit`, or another verb, and check that every process it started has ended."""
    mark = uuid.uuid4().hex
    finished = subprocess.run(
        [sys.executable, "-m", f"hpc.{verb}", *flags],
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert left_behind(mark) == []
    return finished


def environment(mark: str = "") -> dict[str, str]:
    """Of a run whose reward is in tests/fakes."""
    python_path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return {**os.environ, "SLURMLIME_TEST_MARK": mark, "PYTHONPATH": python_path}


def left_behind(mark: str) -> list[str]:
    """Command lines of living processes that were started with `mark` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended, or is not ours
            continue
    return found


Shown = tuple[Run, str]  # a run, and what the terminal showed


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The demo's GRPO run."""
    runs = tmp_path_factory.mktemp("runs")
    finished = submit("--runs-dir", str(runs))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return load_run(runs / "demo"), finished.stdout


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The GRPO run of the demo's two recipes, with a few steps of each. Nothing else differs."""
    runs = tmp_path_factory.mktemp("short")
    data, model = runs / "demo-data", runs / "demo-sft/checkpoints/hf"
    write_assets(data)
    taught = submit(
        *("@demo-sft", "--runs-dir", str(runs), "--name", "demo-sft"),
        *("--hf-checkpoint", str(data / "model"), "--prompt-data", str(data / "sft.jsonl")),
        *("--save-hf", str(model), "--num-rollout", "2", "--rollout-batch-size", "2560"),
        *("--num-steps-per-rollout", "20"),
    )
    assert taught.returncode == 0, taught.stdout + taught.stderr
    finished = submit(
        *("@demo", "--runs-dir", str(runs), "--name", "demo", "--num-rollout", "3", "--lr-warmup-iters", "1"),
        *("--hf-checkpoint", str(model), "--prompt-data", str(data / "train.jsonl")),
        *("--eval-prompt-data", "addition", str(data / "eval.jsonl"), "--eval-interval", "2"),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return load_run(runs / "demo"), finished.stdout


@pytest.fixture(params=["short", pytest.param("demo", marks=pytest.mark.learning)])
def grpo(request: pytest.FixtureRequest) -> Shown:
    """Either of them."""
    return request.getfixturevalue(request.param)


@pytest.mark.learning
def test_the_model_learns_by_reinforcement(demo: Shown) -> None:
    run, _ = demo
    accuracy = run.evals.groupby("step")["reward"].mean()
    assert accuracy.iloc[0] <= 0.5
    assert accuracy.iloc[-1] >= 0.9
    assert run.steps["rollout/reward"].tail(5).mean() > run.steps["rollout/reward"].head(2).mean() + 0.2


@pytest.mark.learning
def test_the_demo_ends_with_a_plot(demo: Shown) -> None:
    run, shown = demo
    plot = run.path / "plots" / "reward_curve.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(plot) in shown


def test_trainer_and_engines_agree_on_every_step(grpo: Shown) -> None:
    run, _ = grpo
    assert (run.steps["train/logprob_abs_diff"].dropna() < 1e-4).all()
    checks = run.events[run.events["kind"] == "logprob_check"]
    assert len(checks) == 1
    assert checks["ok"].all()


def test_every_sample_was_generated_by_the_newest_weights(grpo: Shown) -> None:
    run, _ = grpo
    samples = run.read_samples(columns="all")
    assert len(samples) == len(run.steps[run.steps["step"] >= 0]) * 512
    versions = samples["weight_versions"].map(lambda spans: set(map(str, spans)))
    assert all(found == {str(step)} for step, found in zip(samples["step"], versions, strict=True))


def test_the_terminal_shows_both_accuracies_and_what_to_do_next(grpo: Shown) -> None:
    _, shown = grpo
    assert "before training  eval/addition" in shown
    assert "eval/addition │" in shown
    assert "python -m analysis.sample" in shown


def test_wandb_has_the_run_offline(grpo: Shown) -> None:
    run, _ = grpo
    assert len(list(run.path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_finished_run_says_so(grpo: Shown) -> None:
    run, _ = grpo
    again = submit("--runs-dir", str(run.path.parent), "--name", run.name)
    assert again.returncode == 0
    assert f"has finished its {run.steps['step'].max() + 1:.0f} steps" in again.stdout


SMALL = [
    *("--custom-rm-path", "fakes.reward.by_content", "--label-key", "label"),
    *("--rollout-shuffle", "--rollout-batch-size", "8", "--n-samples-per-prompt", "4"),
    *("--rollout-max-response-len", "24", "--rollout-skip-special-tokens"),
    *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "512"),
    *("--lr", "1e-3", "--save-interval", "2", "--wandb-mode", "disabled"),
    *("--sglang-enable-deterministic-inference",),
]


def small_run(short: Shown, runs_dir: Path) -> list[str]:
    """Flags of a small GRPO run on the fine-tuned model and the demo's prompts."""
    data = short[0].path.parent
    model, prompts = data / "demo-sft/checkpoints/hf", data / "demo-data/train.jsonl"
    return ["--runs-dir", str(runs_dir), "--hf-checkpoint", str(model), "--prompt-data", str(prompts), *SMALL]


@pytest.fixture(scope="module")
def looked_at(short: Shown, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Seen]:
    """A small run that nothing has happened to, and what others saw of it after its first step."""
    runs, mark = tmp_path_factory.mktemp("whole"), uuid.uuid4().hex
    with start(*small_run(short, runs), "--num-rollout", "8", "--name", "whole", mark=mark) as process:
        wait_for_step(runs / "whole", process)
        seen = look_at(process.pid, runs / "whole")
        shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    assert left_behind(mark) == []
    run = load_run(runs / "whole")
    assert (run.steps["train/logprob_abs_diff"] < 1e-4).all()
    return run, seen


@pytest.fixture(scope="module")
def whole(looked_at: tuple[Run, Seen]) -> Run:
    return looked_at[0]


@pytest.fixture(scope="module")
def seen(looked_at: tuple[Run, Seen]) -> Seen:
    return looked_at[1]


def test_a_run_listens_as_the_documentation_says(seen: Seen) -> None:
    table = (TESTS.parent / "docs/security.md").read_text().partition("\n|---|---|---|---|\n")[2]
    documented = {row.split("|")[1].strip() for row in table.partition("\n\n")[0].splitlines()}
    assert set(seen.ports) == documented - {"srun"}
    assert {address for found in seen.ports.values() for address, *_ in found} <= own_addresses()


def test_another_user_of_the_machine_gets_nothing_of_a_run(seen: Seen) -> None:
    assert seen.secret_shown == []
    if seen.taken is None:
        pytest.skip("needs root, to become another user, and the system's Python")
    assert seen.taken["user"] == 65534 and seen.taken["tried"] > 50
    assert (seen.taken["files"], seen.taken["sockets"]) == ([str(OPEN_TO_ALL)], [])

    answered: dict[tuple[str, int], set[str]] = {}
    for url in seen.taken["urls"]:
        where, _, path = url.removeprefix("http://").partition("/")
        host, _, port = where.rpartition(":")
        answered.setdefault((host, int(port)), set()).add("/" + path)
    (counters,) = [each for each in seen.ports["router"] if "/metrics" in answered.get(each, ())]
    del answered[counters]  # whatever is asked there is answered with counters
    (router,), (engine,) = seen.ports["router"] - {counters}, seen.ports["engine"]
    # The router asks the engine for some of them, which may be waiting for the trainer just now.
    allowed = {engine: {"/health", "/metrics"}, router: OPEN_PATHS - {"/metrics"}}
    assert set(answered) == set(allowed)
    assert [found - allowed[each] for each, found in answered.items()] == [set(), set()]


@pytest.fixture(scope="module")
def parts(short: Shown, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A small run that was stopped after its first step; in the second attempt its engine was killed after a step."""
    runs, mark = tmp_path_factory.mktemp("parts"), uuid.uuid4().hex
    interrupt_after_first_step(
        runs / "parts", *small_run(short, runs), "--num-rollout", "8", "--name", "parts"
    )
    with start("--runs-dir", str(runs), "--name", "parts", mark=mark) as process:
        wait_for_step(runs / "parts", process, attempt=1)
        events = load_run(runs / "parts").events
        engines = events[(events["kind"] == "role_ready") & (events["role"] == "engine")]
        os.kill(int(engines[engines["attempt"] == 1].iloc[0]["pid"]), signal.SIGKILL)
        shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    assert left_behind(mark) == []
    return load_run(runs / "parts"), shown


def test_an_engine_that_is_killed_is_replaced_by_one_with_the_current_weights(
    parts: Shown, whole: Run
) -> None:
    killed, shown = parts
    assert "engine-0 is started again" in shown
    died = killed.events[killed.events["kind"] == "role_died"]
    assert died[["attempt", "role"]].values.tolist() == [[1, "engine"]]
    assert killed.steps["attempt"].max() == 1  # no attempt more
    assert_same_curve(killed, whole)  # what was asked of the dead engine was asked again
    samples = killed.read_samples(columns="all")
    versions = samples["weight_versions"].map(lambda spans: set(map(str, spans)))
    assert all(found == {str(step)} for step, found in zip(samples["step"], versions, strict=True))


def test_a_stopped_run_continues_as_if_it_had_not_stopped(parts: Shown, whole: Run) -> None:
    assert set(parts[0].steps["attempt"]) == {0, 1}
    assert_same_curve(parts[0], whole)


@pytest.mark.learning
def test_two_tensor_parallel_ranks_continue_as_if_they_had_not_stopped(short: Shown, tmp_path: Path) -> None:
    layout = ["--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2"]
    common = [*small_run(short, tmp_path), "--num-rollout", "8", *layout]
    assert submit(*common, "--name", "whole").returncode == 0
    interrupt_after_first_step(tmp_path / "parts", *common, "--name", "parts")
    resumed = submit("--runs-dir", str(tmp_path), "--name", "parts")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    parts = load_run(tmp_path / "parts")
    assert set(parts.steps["attempt"]) == {0, 1}
    assert_same_curve(parts, load_run(tmp_path / "whole"))


def test_an_earlier_checkpoint_is_evaluated(short: Shown, whole: Run, tmp_path: Path) -> None:
    trained = whole.read_samples(columns="all", steps=6)  # by the weights after six steps
    lines = (short[0].path.parent / "demo-data/train.jsonl").read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text(
        "\n".join(line for line in lines if json.loads(line)["input"] in set(trained["prompt"])) + "\n"
    )
    kept = {path: path.read_bytes() for path in whole.path.glob("*") if path.is_file()}
    line = ["whole", "--runs-dir", str(whole.path.parent), "--step", "6", "--n-samples-per-eval-prompt", "4"]

    done = submit(*line, "--eval-prompt-data", "few", str(few), verb="evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in the `evals` of whole as later/SET at step 6" in done.stdout
    again = submit(*line, "--eval-prompt-data", "few", str(few), verb="evaluate")
    assert again.returncode == 0 and "later-step-6 has evaluated its weights" in again.stdout

    evals = load_run(whole.path).read_evals("all")
    assert set(zip(evals["dataset"], evals["step"], strict=True)) == {("later/few", 6)}
    assert len(evals) == 4 * len(few.read_text().splitlines())
    known, found = first_tokens(trained), first_tokens(evals)
    both = known.keys() & found.keys()
    assert both
    assert [found[key] for key in both] == pytest.approx([known[key] for key in both], abs=1e-4)
    assert {path: path.read_bytes() for path in whole.path.glob("*") if path.is_file()} == kept


def first_tokens(samples: pd.DataFrame) -> dict[tuple[str, int], float]:
    """The engine's log-prob of the first token after each prompt, by prompt and token."""
    return {
        (row["prompt"], row["tokens"][-row["response_length"]]): row["rollout_log_probs"][0]
        for _, row in samples.iterrows()
    }


@pytest.mark.learning
def test_a_model_split_over_pipeline_stages_and_context_agrees_with_the_engines(
    short: Shown, tmp_path: Path
) -> None:
    layout = ["--actor-num-gpus-per-node", "4", "--pipeline-model-parallel-size", "2"]
    finished = submit(
        *small_run(short, tmp_path),
        "--num-rollout",
        "3",
        "--name",
        "split",
        *layout,
        "--context-parallel-size",
        "2",
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    steps = load_run(tmp_path / "split").steps
    assert steps["step"].tolist() == [0, 1, 2]
    assert (steps["train/logprob_abs_diff"] < 1e-4).all()  # also with weights that it has pushed itself


def assert_same_curve(run: Run, whole: Run) -> None:
    """No gap, no repeat, the same numbers, and the same texts behind them."""
    assert run.steps["step"].tolist() == list(range(8))
    columns = ["rollout/reward", "rollout/response_length", "train/entropy", "train/grad_norm", "train/lr"]
    for column in columns:
        assert run.steps[column].tolist() == pytest.approx(whole.steps[column].tolist(), rel=1e-5), column
    texts = [
        each.read_samples(columns="text").sort_values("index")["response"].tolist() for each in (whole, run)
    ]
    assert texts[0] == texts[1]


def interrupt_after_first_step(run_dir: Path, *flags: str) -> None:
    """Submit, press Ctrl-C as soon as a step is done, and check that the run says it can be resumed."""
    with start(*flags) as process:
        wait_for_step(run_dir, process)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=900)
    assert process.returncode == 130, shown
    assert "resumes from" in shown


def start(*flags: str, mark: str = "") -> subprocess.Popen[str]:
    """`python -m hpc.submit`, with `mark` in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "hpc.submit", *flags],
        env=environment(mark), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_step(run_dir: Path, process: subprocess.Popen[str], attempt: int = 0) -> None:
    """Until the first step of an attempt is done."""

    def is_done() -> bool:
        assert process.poll() is None, "it ended before its first step"
        return any(row.get("attempt") == attempt for row in lines_of(run_dir / "metrics.jsonl"))

    wait_until(is_done, 480, "the first step")
