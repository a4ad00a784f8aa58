"""The PPO example learns; and a whole job combines what the trainer can do beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis import Run, load_run
from rltrain.demo.assets import write_assets

pytestmark = [pytest.mark.slow, pytest.mark.learning]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "ppo" / "recipe.toml"
STEPS = 24


def submit(runs: Path, name: str, *flags: str) -> Run:
    data = runs / "data"
    write_assets(data)
    files = ["--hf-checkpoint", str(data / "model"), "--prompt-data", str(data / "train.jsonl")]
    job = ["--runs-dir", str(runs), "--name", name, "--wandb-mode", "disabled"]
    command = [sys.executable, "-m", "hpc.submit", f"@{RECIPE}", *files, *job, *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return load_run(runs / name)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    runs = tmp_path_factory.mktemp("runs")
    return submit(runs, "ppo", "--save-hf", str(runs / "teacher"))


def test_it_learns(ppo: Run) -> None:
    reward = ppo.steps["rollout/reward"]
    assert reward.head(3).mean() < 0.4
    assert reward.tail(3).mean() > reward.head(3).mean() + 0.35


def test_the_critic_is_trained_first_and_learns_too(ppo: Run) -> None:
    steps = ppo.steps
    assert steps["train/pg_loss"].isna().tolist() == [True] * 2 + [False] * (STEPS - 2)
    loss = steps["critic/value_loss"]
    assert loss.tail(3).mean() < 0.2 * loss.iloc[0]
    assert (steps["critic/lr"] == 5e-3).all() and (steps["train/lr"].dropna() == 3e-3).all()
    assert (ppo.path / "checkpoints" / "critic" / f"iter_{STEPS:07d}").is_dir()


def test_every_token_is_recorded_and_agrees_with_the_engine(ppo: Run) -> None:
    assert len(list(ppo.path.glob("rollouts_trainer/*/*/part-0.parquet"))) == STEPS - 2
    seen = pq.read_table(
        next(ppo.path.glob(f"rollouts_trainer/step={STEPS - 1:06d}/*/*.parquet"))
    ).to_pandas()
    samples = ppo.read_samples(columns="tokens")
    last = samples[samples["step"] == STEPS - 1].set_index("index").loc[seen["index"]]
    ours = np.concatenate(seen["trainer_log_probs"].to_list())
    engine = np.concatenate(last["rollout_log_probs"].to_list())
    np.testing.assert_allclose(ours, engine, atol=1e-3)
    assert (np.concatenate(seen["trainer_entropies"].to_list()) >= -1e-5).all()
    advantages = np.concatenate(seen["advantages"].to_list())
    assert abs(advantages.mean()) < 1e-4 and advantages.std() == pytest.approx(1, abs=1e-2)  # whitened


HOOKS = """
def before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    print("hook:", rollout_id, step_id, flush=True)
"""


def test_a_job_combines_distillation_kl_old_actor_and_hooks(
    ppo: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ppo.path.parent
    (runs / "job_hooks.py").write_text(HOOKS)
    monkeypatch.setenv("PYTHONPATH", str(runs))
    flags = (
        f"--num-rollout 5 --use-opd --opd-type megatron --opd-teacher-load {runs / 'teacher'} --opd-kl-coef 0.5"
        " --kl-coef 0.01 --kl-loss-type k3 --use-kl-loss --kl-loss-coef 0.01 --ref-update-interval 2"
        " --keep-old-actor --update-weights-interval 2 --eps-clip-high 0.28 --eps-clip-c 3 --entropy-coef 0.001"
        " --use-tis --use-opsm --calculate-per-token-loss --num-critic-only-steps 0"
        " --freeze-params-name-list embedding --actor-num-gpus-per-node 2"
        " --custom-megatron-before-train-step-hook job_hooks.before_step"
    )
    run = submit(runs, "combined", *flags.split())
    steps = run.steps
    for name in ("train/kl_loss", "train/opd_reverse_kl", "train/tis", "train/opsm_clipfrac", "train/grad_norm",
                 "critic/value_loss", "perf/tokens_per_s_per_rank", "perf/peak_memory_gib"):  # fmt: skip
        assert np.isfinite(steps[name]).all(), name
    distance = steps["train/opd_reverse_kl"]
    assert distance.iloc[-1] < distance.iloc[0]  # towards the teacher
    assert (steps["train/logprob_abs_diff"].dropna() < 1e-4).all()
    assert steps["train/pg_clipfrac"].max() > 0
    log = (run.path / "logs" / "latest" / "trainer-0.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("hook:")] == [
        f"hook: {rollout} {step}" for rollout in range(5) for step in range(2)
    ]
