"""Checkpoints: what was interrupted goes on as if it had not been, and half-written ones are passed over."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    weights_of,
    write_hf_model,
)

from rltrain.megatron.checkpoint.resume import WeightSource, initial_source
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_resuming_equals_going_on(model_dir: Path, tmp_path: Path, distributed_optimizer: bool) -> None:
    config = make_config(
        model_dir,
        save=str(tmp_path / "checkpoints"),
        use_distributed_optimizer=distributed_optimizer,
        lr_decay_style="cosine",
        use_kl_loss=True,
        kl_loss_coef=0.1,
        num_rollout=4,
    )
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    first = make_actor(config, tmp_path)
    assert first.start_rollout_id == 0
    for i in range(2):
        first.train(i, batches[i])
    first.save(1)
    draws = torch.rand(3)
    expected = [first.train(i, batches[i]) for i in (2, 3)]

    init_single_process()
    second = make_actor(config, tmp_path)
    assert second.start_rollout_id == 2
    assert torch.equal(torch.rand(3), draws)
    # One process, the same order of operations: the same bits.
    assert [second.train(i, batches[i]) for i in (2, 3)] == expected
    assert torch.equal(weights_of(second), weights_of(first))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_flags_of_the_optimizer_that_are_given_on_resume_act(
    model_dir: Path, tmp_path: Path, ckpt_format: str
) -> None:
    config = make_config(model_dir, save=str(tmp_path / "checkpoints"), ckpt_format=ckpt_format)
    first = make_actor(config, tmp_path)
    first.train(0, make_batch(8))
    first.save(0)
    init_single_process()
    second = make_actor(config.replace(lr=1e-5, min_lr=1e-6, adam_beta2=0.5), tmp_path)
    assert second.start_rollout_id == 1
    for group in second.policy.optimizer.param_groups:
        assert (group["max_lr"], group["min_lr"], group["betas"][1]) == (1e-5, 1e-6, 0.5)
        assert group["lr"] <= 1e-5


def test_event_and_files(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"), save_hf=str(tmp_path / "hf-{rollout_id}"))
    actor = make_actor(config, tmp_path)
    checkpoint = actor.save(39)
    assert checkpoint == tmp_path / "c" / "iter_0000040"
    assert (tmp_path / "c" / "latest_checkpointed_iteration.txt").read_text() == "40"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    on_disk = {
        path.name: {"size": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    assert files == on_disk and sum(entry["size"] for entry in files.values()) > 1000
    assert actor._registry.events == [("checkpoint_saved", {"step": 40, "path": str(checkpoint)})]
    assert (tmp_path / "hf-39" / "model.safetensors").exists()
    assert not list((tmp_path / "c").glob(".*"))


def test_half_written_and_damaged_checkpoints_are_passed_over(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save = tmp_path / "checkpoints"
    config = make_config(model_dir, save=str(save))
    actor = make_actor(config, tmp_path)
    actor.train(0, make_batch(8))
    for rollout_id in range(5):
        actor.save(rollout_id)
    shards = {number: next((save / f"iter_{number:07d}").glob("*.distcp")) for number in (2, 3, 4)}
    with shards[2].open("r+b") as file:
        file.truncate(10)
    shards[3].unlink()
    content = bytearray(shards[4].read_bytes())
    content[len(content) // 2] ^= 1  # a bit that has turned over, in a file of the right size
    shards[4].write_bytes(content)
    (save / "iter_0000005" / "manifest.json").write_text("{")
    shutil.copytree(save / "iter_0000001", save / ".iter_0000006.tmp")  # stopped while writing
    with caplog.at_level(logging.WARNING):
        assert make_actor(config, tmp_path).start_rollout_id == 1
    said = next(each for each in reversed(caplog.messages) if each.startswith("passed over"))
    for part in (
        f"iter_0000002 ({shards[2].name} has 10 of ",
        f"iter_0000003 ({shards[3].name} is missing)",
        f"iter_0000004 ({shards[4].name} is damaged",
        "iter_0000005 (manifest.json cannot be read)",
        "continuing from iter_0000001",
    ):
        assert part in said
    resumed = make_actor(config, tmp_path)
    resumed.save(1)  # overwrites what was cut off
    assert make_actor(config, tmp_path).start_rollout_id == 2


def test_finetune_takes_the_weights_of_another_run_only(model_dir: Path, tmp_path: Path) -> None:
    sft = make_actor(make_config(model_dir, save=str(tmp_path / "sft"), loss_type="sft_loss"), tmp_path)
    for i in range(2):
        sft.train(i, make_batch(8, seed=i))
        sft.save(i)
    config = make_config(model_dir, load=str(tmp_path / "sft"), save=str(tmp_path / "rl"), finetune=True)
    rl = make_actor(config, tmp_path)
    assert rl.start_rollout_id == 0
    assert torch.equal(weights_of(rl), weights_of(sft))
    assert not rl.policy.optimizer.optimizer.state  # Adam starts afresh
    rl.train(0, make_batch(8))
    rl.save(0)
    resumed = make_actor(config, tmp_path)  # now the run's own checkpoint comes first
    assert resumed.start_rollout_id == 1
    assert torch.equal(weights_of(resumed), weights_of(rl))
    earlier = make_actor(
        make_config(model_dir, load=str(tmp_path / "sft"), ckpt_step=1, finetune=True), tmp_path
    )
    assert not torch.equal(weights_of(earlier), weights_of(sft))


def test_hf_directory_as_load(model_dir: Path, tmp_path: Path) -> None:
    other = write_hf_model(tmp_path / "other", tiny_config(), seed=7)
    loaded = make_actor(make_config(model_dir, load=str(other)), tmp_path)
    assert torch.equal(weights_of(loaded), weights_of(make_actor(make_config(other), tmp_path)))


def test_the_policy_starts_from_the_reference_where_load_has_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """slime's rule; a script there names the same empty directory for --load and --save."""
    other = write_hf_model(tmp_path / "other", tiny_config(), seed=7)
    trained = make_actor(make_config(other, save=str(tmp_path / "reference")), tmp_path)
    trained.train(0, make_batch(8))
    trained.save(0)
    capsys.readouterr()
    same = str(tmp_path / "run")
    config = make_config(model_dir, load=same, save=same, ref_load=str(tmp_path / "reference"))
    started = make_actor(config, tmp_path)
    assert (
        f"the policy's weights come from --ref-load {tmp_path}/reference/iter_0000001"
        in capsys.readouterr().out
    )
    assert torch.equal(weights_of(started), weights_of(trained))
    assert started.start_rollout_id == 0 and not started.policy.optimizer.optimizer.state
    started.train(0, make_batch(8))
    started.save(0)
    resumed = make_actor(config, tmp_path)
    assert f"the policy's weights come from --save {same}/iter_0000001" in capsys.readouterr().out
    assert torch.equal(weights_of(resumed), weights_of(started)) and resumed.start_rollout_id == 1

    def source(**changes: Any) -> WeightSource:
        changed = config.replace(**changes)
        return initial_source(changed.checkpoint, changed.model)

    assert source(load=str(tmp_path / "nowhere")).flag == "--ref-load"
    assert source(load=str(other)).flag == "--load"
    assert source(random_init=True).flag == "--random-init"
    assert source(ref_load=None).flag == "--hf-checkpoint"


def test_resuming_without_the_optimizer(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"), no_save_optim=True)
    actor = make_actor(config, tmp_path)
    actor.train(0, make_batch(8))
    actor.save(0)
    resumed = make_actor(make_config(model_dir, save=str(tmp_path / "c")), tmp_path)
    assert resumed.start_rollout_id == 1
    assert torch.equal(weights_of(resumed), weights_of(actor))
    assert not resumed.policy.optimizer.optimizer.state


def test_load_of_nothing_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--load .*empty holds neither"):
        make_actor(make_config(model_dir, load=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(UserError, match=r"--ref-load .*empty holds neither"):
        make_actor(make_config(model_dir, ref_load=str(tmp_path / "empty")), tmp_path)
    # the same directory for both, as slime's scripts have it, is where the run will save
    same = str(tmp_path / "empty")
    assert make_actor(make_config(model_dir, load=same, save=same), tmp_path).start_rollout_id == 0
