"""Trainer and engines that share GPUs: who gives up memory before whom, and what is moved."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.megatron import (
    init_single_process,
    make_actor,
    make_batch,
    make_config,
    tiny_config,
    write_hf_model,
)

from rltrain.arguments.config import Config
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.job import make_room
from rltrain.megatron.checkpoint.save import CheckpointWriter
from rltrain.megatron.device import own_device, refill, release, restore, store
from rltrain.megatron.memory import EngineMemory, Offload
from rltrain.megatron.model.host_copy import PastPolicies
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError

pytestmark = pytest.mark.slow


class NotedSwap:
    """Notes what is asked of it."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes, self.is_out = name, notes, False

    def out(self) -> None:
        self.is_out = True
        self.notes.append(f"{self.name} out")

    def back(self) -> None:
        self.is_out = False
        self.notes.append(f"{self.name} back")


class NotedEngine:
    """Notes what is asked of it."""

    def __init__(self, url: str, notes: list[str], is_ours: bool = True) -> None:
        self.url, self.notes, self.is_ours = url, notes, is_ours

    def pause_generation(self) -> None:
        self.notes.append(f"{self.url} pauses")

    def release_memory(self, tag: str) -> None:
        self.notes.append(f"{self.url} releases {tag}")

    def resume_memory(self, tag: str) -> None:
        self.notes.append(f"{self.url} resumes {tag}")


class LostEngine(NotedEngine):
    """A fault: from the named request on it does not answer, or refuses."""

    def __init__(self, url: str, notes: list[str], fails_at: str, error: Exception) -> None:
        super().__init__(url, notes)
        self._fails_at, self._error = fails_at, error

    def pause_generation(self) -> None:
        self._answer("pause")
        super().pause_generation()

    def release_memory(self, tag: str) -> None:
        self._answer(tag)
        super().release_memory(tag)

    def _answer(self, request: str) -> None:
        if request == self._fails_at:
            raise self._error


class Fleet:
    """An `Offload` of one model with engines that can be exchanged, and what it has asked for."""

    def __init__(self, **flags: bool) -> None:
        init_single_process()
        self.notes: list[str] = []
        self.engines = [NotedEngine("a", self.notes), NotedEngine("external", self.notes, is_ours=False)]
        model = Namespace(
            weights_swap=NotedSwap("weights", self.notes), state_swap=NotedSwap("state", self.notes)
        )
        config = Config().replace(**({"offload_train": True, "offload_rollout": True} | flags))
        self.memory = EngineMemory(config.engines, config.debug)
        self.offload = Offload(config.engines, [model], self.memory)

    def find(self) -> Sequence[NotedEngine]:
        return self.engines

    def taken(self) -> list[str]:
        taken, self.notes[:] = list(self.notes), []
        return taken


def test_whoever_gives_up_memory_goes_first() -> None:
    fleet = Fleet()
    fleet.offload.for_push(fleet.find)  # both have all of it at the start
    assert fleet.taken() == ["state out"]
    fleet.offload.for_generating()
    assert fleet.taken() == ["weights out"]
    for _ in range(2):
        fleet.offload.for_training()
        assert fleet.taken() == ["a releases kv_cache", "a releases weights", "weights back", "state back"]
        fleet.offload.for_push(fleet.find)
        assert fleet.taken() == ["state out", "a resumes weights"]
        fleet.offload.for_generating()
        assert fleet.taken() == ["weights out", "a resumes kv_cache"]
        fleet.offload.for_generating()
        assert fleet.taken() == []


@pytest.mark.parametrize("has_gpu", [True, False])
def test_engines_give_up_their_memory_before_the_trainer_builds_its_model(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet()
    monkeypatch.setattr("rltrain.job.use_cuda", lambda: has_gpu)
    monkeypatch.setattr("rltrain.job.find_engines", lambda *_: fleet.engines)
    waiting = Namespace(wait_for=lambda role, count: fleet.notes.append(f"{count} {role} is there"))
    engines = Engines(offload_rollout=True, rollout_num_gpus=1)
    make_room(engines, Debug(), Namespace(token="t"), waiting, fleet.memory)  # type: ignore[arg-type]
    if not has_gpu:
        assert fleet.taken() == []
        return
    assert fleet.taken() == ["1 engine is there", "a releases kv_cache", "a releases weights"]
    fleet.offload.for_push(fleet.find)
    assert fleet.taken() == ["state out", "a resumes weights"]
    fleet.offload.for_generating()
    assert fleet.taken() == ["weights out", "a resumes kv_cache"]


def test_generating_without_a_push_gives_the_engines_all() -> None:
    fleet = Fleet()
    fleet.offload.for_push(fleet.find)
    fleet.offload.for_training()
    fleet.taken()
    fleet.offload.for_generating()
    assert fleet.taken() == ["state out", "weights out", "a resumes weights", "a resumes kv_cache"]


def test_who_saves_while_engines_generate_has_all() -> None:
    fleet = Fleet()
    fleet.offload.for_push(fleet.find)
    fleet.offload.for_training()
    fleet.taken()
    fleet.offload.for_saving()  # has it already
    assert fleet.taken() == []
    fleet.offload.for_generating()
    fleet.taken()
    fleet.offload.for_saving()
    assert fleet.taken() == [
        "a pauses", "a releases kv_cache", "a releases weights", "weights back", "state back",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fails_at", "error", "before"),
    [
        ("pause", ConnectionRefusedError("it is dead"), []),
        ("kv_cache", HttpError("it computes", 400), ["lost pauses"]),
        ("weights", TimeoutError("it hangs"), ["lost pauses", "lost releases kv_cache"]),
    ],
)
def test_an_engine_that_does_not_answer_does_not_keep_the_trainer_from_saving(
    fails_at: str, error: Exception, before: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Fleet()
    fleet.engines.insert(0, LostEngine("lost", fleet.notes, fails_at, error))
    fleet.offload.for_push(fleet.find)
    fleet.offload.for_generating()
    fleet.taken()
    fleet.offload.for_saving()
    taken = fleet.taken()
    assert [each for each in taken if each.startswith("lost")] == before
    assert [each for each in taken if not each.startswith("lost")] == [
        "a pauses", "a releases kv_cache", "a releases weights", "weights back", "state back",
    ]  # fmt: skip
    assert f"warning: the engine lost did not free its GPU memory: {error}" in capsys.readouterr().out


def test_weights_are_there_when_a_checkpoint_or_the_past_policies_are_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may be asked for while engines generate: by a stop, and by an engine that was started again."""
    init_single_process()
    model, seen = write_hf_model(tmp_path / "model", tiny_config()), []
    flags = {"offload_train": True, "keep_old_actor": True, "save": str(tmp_path / "saved")}
    actor = make_actor(make_config(model, **flags), tmp_path)
    weights, state = actor.policy.weights_swap, actor.policy.state_swap
    for owner, name in ((CheckpointWriter, "save"), (PastPolicies, "remember")):
        monkeypatch.setattr(owner, name, lambda *_: seen.append((weights.is_out, state.is_out)))
    monkeypatch.setattr(actor._weight_push, "push", lambda *_: None)
    actor.offload.for_generating()
    actor.update_weights(list, 0)
    assert weights.is_out and state.is_out
    actor.save(0)
    assert seen == [(False, True), (False, False)]


def test_an_engine_that_was_started_again_has_nothing_to_resume() -> None:
    fleet = Fleet()
    fleet.offload.for_push(fleet.find)
    fleet.offload.for_training()
    fleet.engines[0] = NotedEngine("a again", fleet.notes)
    fleet.taken()
    fleet.offload.for_push(fleet.find)
    assert fleet.taken() == ["state out"]
    fleet.offload.for_training()
    assert "a again releases weights" in fleet.taken()


@pytest.mark.parametrize(("flag", "left"), [("offload_train", "a "), ("offload_rollout", "state ")])
def test_only_what_the_flags_name_is_moved(flag: str, left: str) -> None:
    fleet = Fleet(**{flag: False})
    fleet.offload.for_push(fleet.find)
    fleet.offload.for_training()
    fleet.offload.for_generating()
    words = fleet.taken()
    assert any(word.startswith(left) for word in words)
    other = ("weights out", "state out") if flag == "offload_train" else ("a releases weights",)
    assert not set(other) & set(words)


@pytest.mark.parametrize("distributed", [False, True])
def test_weights_and_the_rest_are_all_and_share_no_memory(tmp_path: Path, distributed: bool) -> None:
    init_single_process()
    model = write_hf_model(tmp_path / "model", tiny_config())
    actor = make_actor(make_config(model, use_distributed_optimizer=distributed, bf16=distributed), tmp_path)
    actor.train(0, make_batch(8))
    policy = actor.policy
    weights, state, everything = (
        {tensor.untyped_storage().data_ptr() for tensor in each()}
        for each in (policy._weights, policy._state, policy._tensors)
    )
    assert weights | state == everything and not weights & state
    assert {
        parameter.data.untyped_storage().data_ptr() for parameter in policy.models[0].parameters()
    } <= weights

    before = [tensor.clone() for tensor in policy._tensors()]
    assert not any(tensor.any() for tensor in policy._gradients())
    released = release(policy._gradients())
    stored = [store(policy._state()), store(policy._weights())]
    assert len(released) == len(list(policy._gradients())) and len(stored[0]) > 0
    assert all(not tensor.untyped_storage().nbytes() for tensor in policy._weights())
    for each in reversed(stored):
        restore(each)
    refill(released)
    assert all(torch.equal(old, new) for old, new in zip(before, policy._tensors(), strict=True))
    assert actor.train(1, make_batch(8, seed=1))["train/grad_norm"] > 0


@pytest.mark.parametrize(
    ("rank", "ranks", "visible", "expected"),
    [(3, 4, 4, 3), (3, 4, 8, 3), (3, 4, 1, 0), (0, 1, 1, 0)],
    ids=["all GPUs", "more GPUs", "bound to one", "alone"],
)
def test_the_device_of_a_rank(rank: int, ranks: int, visible: int, expected: int) -> None:
    assert own_device({"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}, visible) == expected


def test_ranks_without_a_gpu_of_their_own_are_refused() -> None:
    env = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(UserError, match=r"4 trainer ranks .* only 2 visible GPUs .*CUDA_VISIBLE_DEVICES=0,1"):
        own_device(env, 2)
