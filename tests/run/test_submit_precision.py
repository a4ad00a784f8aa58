"""bf16 and the distributed optimizer where the trainer has GPUs, fp32 on a CPU; a run that goes on keeps its own."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from hpc.planning.sbatch_flags import Component
from hpc.planning.slurm_tables import SlurmTables
from hpc.submit import main
from hpc.submitting import precision, run_dir
from hpc.submitting.command_line import read_request
from rltrain import arguments, inputs
from rltrain.arguments.config import Config
from rltrain.run.layout import RunLayout

FLAGS = ("--prompt-data=/dev/null", "--num-rollout=1", "--rollout-batch-size=8", "--hf-checkpoint=/m")
RECORDED = Path(__file__).parents[1] / "recorded" / "version_0_1" / "add" / "config.toml"


def decided(layout: RunLayout, *words: str, gpus: bool) -> tuple[bool, bool, str]:
    config, text = precision.decide(arguments.parse([*FLAGS, *words]), layout, gpus=gpus)
    return config.model.bf16, config.parallel.use_distributed_optimizer, text


def test_gpus_decide_where_no_flag_does(tmp_path: Path) -> None:
    new = RunLayout(tmp_path / "new")
    on = "chosen because the trainer has GPUs: --bf16 --use-distributed-optimizer"
    off = "chosen because the trainer has no GPU: --no-bf16 --no-use-distributed-optimizer"
    assert decided(new, gpus=True) == (True, True, on)
    assert decided(new, gpus=False) == (False, False, off)
    assert decided(new, "--no-bf16", gpus=True) == (
        *(False, True, "chosen because the trainer has GPUs: --use-distributed-optimizer"),
    )
    assert decided(new, "--bf16", "--no-use-distributed-optimizer", gpus=False) == (True, False, "")


def stored(layout: RunLayout, text: str, *, saved: bool) -> RunLayout:
    layout.checkpoints.mkdir(parents=True)
    layout.config.write_text(text)
    if saved:
        (layout.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    return layout


def test_a_run_with_a_checkpoint_goes_on_as_it_was(tmp_path: Path) -> None:
    old = tomllib.loads(RECORDED.read_text())["train"]
    text = f"[train]\nbf16 = {str(old['bf16']).lower()}\nuse_distributed_optimizer = false\n"
    old_run = stored(RunLayout(tmp_path / "old"), text, saved=True)
    so = "chosen because the run began this way: --no-bf16 --no-use-distributed-optimizer"
    assert decided(old_run, gpus=True) == (False, False, so)
    assert decided(old_run, "--bf16", gpus=True)[:2] == (True, False)  # a flag counts more
    unsaved = stored(RunLayout(tmp_path / "unsaved"), text, saved=False)
    assert decided(unsaved, gpus=True)[:2] == (True, True)
    new_run = RunLayout(tmp_path / "new")
    config, _ = precision.decide(arguments.parse(list(FLAGS)), new_run, gpus=True)
    run_dir.prepare(new_run, config, {"lr": ["0.1"]})
    assert arguments.load(new_run.root).model.bf16 is True  # what every role reads
    stored_flags = run_dir.stored_flags(new_run)
    assert stored_flags == {"lr": ["0.1"]}  # so that a flag given on resume wins
    new_run.checkpoints.mkdir()
    (new_run.checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    assert decided(new_run, gpus=False)[:2] == (True, True)


def test_gpus_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(gpus: int, tables: SlurmTables | None = None) -> bool:
        return precision.has_gpus(Component("trainer", 2, gpus, None, "p"), tables or SlurmTables())

    monkeypatch.setattr("hpc.submitting.precision.torch_is_for_cpus", lambda: False)
    assert found(8) and not found(0)
    assert not found(8, SlurmTables(env={"CUDA_VISIBLE_DEVICES": ""}))
    monkeypatch.setattr("hpc.submitting.precision.torch_is_for_cpus", lambda: True)
    assert not found(8)
    assert found(8, SlurmTables(python="python3"))  # of a container, with a torch of its own
    _, chosen = precision.decide(Config(), RunLayout(Path("/nowhere")), gpus=False, idle=True)
    assert "can't use the job's GPUs (torch for CPUs" in chosen and "--no-bf16" in chosen


def test_a_recipe_may_say_no(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("bf16 = false\n")
    request = read_request([f"@{tmp_path / 'r.toml'}", f"--runs-dir={tmp_path}"])
    assert request.train == {"bf16": None, "no-bf16": []}
    for demo in ("@demo-sft", "@demo"):
        train = read_request([demo]).train
        assert train["no-bf16"] == train["no-use-distributed-optimizer"] == []
    assert Config().model.bf16 is None


def test_submit_says_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fake nvidia-smi, and a torch that claims to be built for CUDA."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '0, GPU-a, 81559'\necho '1, GPU-b, 81559'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("hpc.gpus.torch_is_for_cpus", lambda: False)
    monkeypatch.setattr(inputs, "check_inputs", lambda args, to_come=None: args)
    monkeypatch.setattr(sys, "argv", ["submit", "--dry-run", f"--runs-dir={tmp_path}", *FLAGS])
    assert main() == 0
    out, err = capsys.readouterr()
    assert "chosen because the trainer has GPUs: --bf16 --use-distributed-optimizer\n" in err
    assert "engine-0: CUDA_VISIBLE_DEVICES=1" in out
