"""Checkpoints: other formats, in the background, on a full disk, of another model; which ones stay."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron import (
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    weights_of,
    write_hf_model,
)

from rltrain.megatron.checkpoint import directory as checkpoint_dir
from rltrain.megatron.checkpoint import save as checkpoint_save
from rltrain.run.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("how", [{"ckpt_format": "torch"}, {"async_save": True}])
def test_resuming_equals_going_on(
    model_dir: Path, tmp_path: Path, how: dict[str, Any], distributed_optimizer: bool
) -> None:
    config = make_config(
        model_dir, save=str(tmp_path / "c"), use_distributed_optimizer=distributed_optimizer, **how
    )
    first = make_actor(config, tmp_path)
    first.train(0, make_batch(8))
    first.save(0)
    expected = first.train(1, make_batch(8, seed=1))  # in the background: what is saved is from before this
    first.finish()
    assert first._registry.events[-1] == (
        "checkpoint_saved",
        {"step": 1, "path": str(tmp_path / "c" / "iter_0000001")},
    )
    second = make_actor(config, tmp_path)
    assert second.start_rollout_id == 1
    assert second.train(1, make_batch(8, seed=1)) == expected
    assert torch.equal(weights_of(second), weights_of(first))
    name = "mp_rank_00/model_optim_rng.pt" if "ckpt_format" in how else "metadata.json"
    assert (tmp_path / "c" / "iter_0000001" / name).exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, writing fails beyond this size; also in processes that are started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", [{}, {"async_save": True}, {"ckpt_format": "torch"}, {"reserve": 16 << 20}])
def test_a_full_disk_leaves_older_checkpoints_and_the_run_goes_on(
    model_dir: Path,
    tmp_path: Path,
    how: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkpoint_save, "_RESERVE_BYTES", how.pop("reserve", 1))
    config = make_config(model_dir, save=str(tmp_path / "c"), **how)
    actor = make_actor(config, tmp_path)
    actor.save(0)
    actor.finish()
    actor.train(0, make_batch(8))
    with files_of_at_most(20_000):
        actor.save(1)
        actor.finish()
    kind, fields = actor._registry.events[-1]
    assert (kind, fields["step"]) == ("checkpoint_failed", 2)
    assert "iter_0000002 was not saved" in fields["reason"]
    assert "warning: iter_0000002 was not saved" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "c").glob("*iter_*")] == ["iter_0000001"]
    actor.train(1, make_batch(8))
    actor.save(2)  # there is space again
    actor.finish()
    assert actor._registry.events[-1][0] == "checkpoint_saved"
    assert make_actor(config, tmp_path).start_rollout_id == 3


def test_too_little_space_is_noticed_before_writing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = make_actor(make_config(model_dir, save=str(tmp_path / "c")), tmp_path)

    def nearly_full_disk(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", nearly_full_disk)
    assert actor.save(0) is None
    assert "the disk is full: it takes" in actor._registry.events[-1][1]["reason"]


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_another_models_checkpoint_names_the_first_difference(
    model_dir: Path, tmp_path: Path, ckpt_format: str
) -> None:
    make_actor(make_config(model_dir, save=str(tmp_path / "c"), ckpt_format=ckpt_format), tmp_path).save(0)
    wider = write_hf_model(tmp_path / "wider", tiny_config(intermediate_size=128))
    with pytest.raises(UserError) as caught:
        make_actor(make_config(wider, load=str(tmp_path / "c")), tmp_path)
    for part in (
        "iter_0000001 holds a different model",
        "mlp.linear_fc1.weight",
        "in the checkpoint and",
        "128",
    ):
        assert part in str(caught.value)
    qwen2 = write_hf_model(tmp_path / "qwen2", tiny_config("Qwen2ForCausalLM"))
    with pytest.raises(UserError, match=r"it has no .*linear_qkv\.bias, which is"):
        make_actor(make_config(qwen2, load=str(tmp_path / "c")), tmp_path)


def test_checkpoints_that_others_may_have_written_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # TMPDIR may lie where nobody else comes
        Path(name).chmod(0o755)  # pytest's own directories are nobody else's
        checkpoint = make_actor(make_config(model_dir, save=f"{name}/c"), tmp_path).save(0)
        (checkpoint / "common.pt").chmod(0o646)
        for load in (f"{name}/c", str(checkpoint)):
            with pytest.raises(UserError, match=r"common.pt is writable by everybody.*--trust-load.*chmod"):
                make_actor(make_config(model_dir, load=load), tmp_path)
        make_actor(make_config(model_dir, load=load, trust_load=True, finetune=True), tmp_path)


def test_optimizers_of_two_kinds_are_told_apart(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"), use_distributed_optimizer=True)
    make_actor(config, tmp_path).save(0)
    with pytest.raises(UserError, match=r"saved with --use-distributed-optimizer, and this run is without"):
        make_actor(make_config(model_dir, save=str(tmp_path / "c")), tmp_path)
    plain = make_config(model_dir, save=str(tmp_path / "c"), no_load_optim=True)
    assert make_actor(plain, tmp_path).start_rollout_id == 1


def test_load_of_another_run_goes_on_with_optimizer_and_rollout(model_dir: Path, tmp_path: Path) -> None:
    first = make_actor(make_config(model_dir, save=str(tmp_path / "a")), tmp_path)
    first.train(0, make_batch(8))
    checkpoint = first.save(0)
    expected = first.train(1, make_batch(8, seed=1))
    # the directory of one checkpoint will do, too
    for load in (tmp_path / "a", checkpoint):
        config = make_config(model_dir, load=str(load), save=str(tmp_path / "b"))
        second = make_actor(config, tmp_path)
        assert second.start_rollout_id == 1
        assert second.train(1, make_batch(8, seed=1)) == expected


def test_random_numbers_can_be_left_out(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"))
    first = make_actor(config, tmp_path)
    first.train(0, make_batch(8))
    first.save(0)
    after = torch.rand(3)
    make_actor(config, tmp_path)
    assert torch.equal(torch.rand(3), after)
    make_actor(make_config(model_dir, save=str(tmp_path / "c"), no_load_rng=True), tmp_path)
    assert not torch.equal(torch.rand(3), after)
    make_actor(make_config(model_dir, save=str(tmp_path / "c"), no_save_rng=True), tmp_path).save(0)
    make_actor(make_config(model_dir, save=str(tmp_path / "c")), tmp_path)  # there are none to be restored
    assert not torch.equal(torch.rand(3), after)


def test_only_the_newest_checkpoints_stay(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(model_dir, save=str(tmp_path / "c"), keep_last_k=2)
    actor = make_actor(config, tmp_path)
    for rollout_id in range(3):
        actor.save(rollout_id)
    names = sorted(path.name for path in (tmp_path / "c").glob("*iter_*"))
    assert names == ["iter_0000002", "iter_0000003"]


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "gone"),
    [(None, None, []), (2, None, [1, 2, 3]), (None, 2, [1, 3]), (2, 3, [1, 2]), (9, None, [])],
)
def test_which_checkpoints_may_go(
    keep_last: int | None, retain_interval: int | None, gone: list[int]
) -> None:
    assert checkpoint_dir.to_remove([3, 1, 2, 5, 4], keep_last, retain_interval) == gone
