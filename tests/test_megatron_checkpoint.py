"""Checkpoints: what was interrupted goes on as if it had not been, and half-written ones are passed over."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_args,
    make_batch,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_single_process()
    return write_hf_model(tmp_path_factory.mktemp("model"), tiny_config())


def weights_of(actor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.cat([weight.detach().flatten().clone() for weight in actor.models[0].parameters()])


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_resuming_equals_going_on(model_dir: Path, tmp_path: Path, distributed_optimizer: bool) -> None:
    args = make_args(
        model_dir,
        save=str(tmp_path / "checkpoints"),
        use_distributed_optimizer=distributed_optimizer,
        lr_decay_style="cosine",
        use_kl_loss=True,
        kl_loss_coef=0.1,
        num_rollout=4,
    )
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    first = make_actor(args, tmp_path)
    assert first.start_rollout_id == 0
    for i in range(2):
        first.train(i, batches[i])
    first.save(1)
    draws = torch.rand(3)
    expected = [first.train(i, batches[i]) for i in (2, 3)]

    init_single_process()
    second = make_actor(args, tmp_path)
    assert second.start_rollout_id == 2
    assert torch.equal(torch.rand(3), draws)
    # One process, the same order of operations: the same bits.
    assert [second.train(i, batches[i]) for i in (2, 3)] == expected
    assert torch.equal(weights_of(second), weights_of(first))


def test_event_and_files(model_dir: Path, tmp_path: Path) -> None:
    args = make_args(model_dir, save=str(tmp_path / "c"), save_hf=str(tmp_path / "hf-{rollout_id}"))
    actor = make_actor(args, tmp_path)
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
    args = make_args(model_dir, save=str(save))
    actor = make_actor(args, tmp_path)
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
        assert make_actor(args, tmp_path).start_rollout_id == 1
    said = caplog.messages[-1]
    for part in (
        f"iter_0000002 ({shards[2].name} has 10 of ",
        f"iter_0000003 ({shards[3].name} is missing)",
        f"iter_0000004 ({shards[4].name} is damaged",
        "iter_0000005 (manifest.json cannot be read)",
        "continuing from iter_0000001",
    ):
        assert part in said
    resumed = make_actor(args, tmp_path)
    resumed.save(1)  # overwrites what was cut off
    assert make_actor(args, tmp_path).start_rollout_id == 2


def test_finetune_takes_the_weights_of_another_run_only(model_dir: Path, tmp_path: Path) -> None:
    sft = make_actor(make_args(model_dir, save=str(tmp_path / "sft"), loss_type="sft_loss"), tmp_path)
    for i in range(2):
        sft.train(i, make_batch(8, seed=i))
        sft.save(i)
    args = make_args(model_dir, load=str(tmp_path / "sft"), save=str(tmp_path / "rl"), finetune=True)
    rl = make_actor(args, tmp_path)
    assert rl.start_rollout_id == 0
    assert torch.equal(weights_of(rl), weights_of(sft))
    assert not rl.policy.optimizer.optimizer.state  # Adam starts afresh
    rl.train(0, make_batch(8))
    rl.save(0)
    resumed = make_actor(args, tmp_path)  # now the run's own checkpoint comes first
    assert resumed.start_rollout_id == 1
    assert torch.equal(weights_of(resumed), weights_of(rl))
    earlier = make_actor(
        make_args(model_dir, load=str(tmp_path / "sft"), ckpt_step=1, finetune=True), tmp_path
    )
    assert not torch.equal(weights_of(earlier), weights_of(sft))


def test_hf_directory_as_load(model_dir: Path, tmp_path: Path) -> None:
    other = write_hf_model(tmp_path / "other", tiny_config(), seed=7)
    loaded = make_actor(make_args(model_dir, load=str(other)), tmp_path)
    assert torch.equal(weights_of(loaded), weights_of(make_actor(make_args(other), tmp_path)))


def test_resuming_without_the_optimizer(model_dir: Path, tmp_path: Path) -> None:
    args = make_args(model_dir, save=str(tmp_path / "c"), no_save_optim=True)
    actor = make_actor(args, tmp_path)
    actor.train(0, make_batch(8))
    actor.save(0)
    resumed = make_actor(make_args(model_dir, save=str(tmp_path / "c")), tmp_path)
    assert resumed.start_rollout_id == 1
    assert torch.equal(weights_of(resumed), weights_of(actor))
    assert not resumed.policy.optimizer.optimizer.state


def test_load_of_nothing_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--load .*empty holds neither"):
        make_actor(make_args(model_dir, load=str(tmp_path / "empty")), tmp_path)
    with pytest.raises(UserError, match=r"--ref-load .*empty holds neither"):
        make_actor(make_args(model_dir, ref_load=str(tmp_path / "empty"), use_kl_loss=True), tmp_path)
    # the same directory for both, as slime's scripts have it, is where the run will save
    same = str(tmp_path / "empty")
    assert make_actor(make_args(model_dir, load=same, save=same), tmp_path).start_rollout_id == 0
