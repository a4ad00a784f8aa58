"""Traces of a trainer that trains, and the history of its memory."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.megatron import make_actor, make_batch, make_config

from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments.config import Config
from rltrain.megatron import profile
from rltrain.megatron.profile import Profiler
from rltrain.run.role import RoleContext

TWO_STEPS = {"num_steps_per_rollout": 2, "micro_batch_size": 4}


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events of a trace that last."""
    return [each for each in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "dur" in each]


def names_of(path: Path) -> set[str]:
    return {each["name"] for each in events_of(path)}


def has_backward(names: set[str]) -> bool:
    return any("Backward" in name for name in names)


@pytest.mark.slow
def test_traces_of_the_parts_of_one_rollout(model_dir: Path, tmp_path: Path) -> None:
    flags = {"use_pytorch_profiler": True, "profile_target": ["train_actor", "train_log_probs"],
             "profile_step_start": 1, "profile_step_end": 2}  # fmt: skip
    results = []
    for name, given in (("plain", {}), ("profiled", flags)):
        actor = make_actor(make_config(model_dir, **TWO_STEPS, **given), tmp_path / name)
        results.append([actor.train(number, make_batch(8)) for number in (5, 6, 7)])
    assert results[0] == results[1]
    assert not (tmp_path / "plain" / "profile").exists()
    files = {path.name: path for path in (tmp_path / "profiled" / "profile").iterdir()}
    ending = "_rank_0.6.pt.trace.json.gz"  # the second rollout, whatever its number
    assert files.keys() == {f"train_actor{ending}", f"train_log_probs{ending}"}
    trained, computed = (names_of(files[f"{part}{ending}"]) for part in ("train_actor", "train_log_probs"))
    assert "aten::mm" in trained and has_backward(trained)
    assert "aten::mm" in computed and not has_backward(computed)


@pytest.mark.slow
def test_a_trace_of_everything_has_its_parts_marked(model_dir: Path, tmp_path: Path) -> None:
    flags = {"use_pytorch_profiler": True, "profile_step_start": 0, "profile_step_end": 1,
             "profile_target": ["train_overall", "train_actor"], "tensorboard_dir": str(tmp_path / "tb")}  # fmt: skip
    config = make_config(model_dir, **TWO_STEPS, **flags)
    make_actor(config, tmp_path).train(0, make_batch(8))
    (path,) = (tmp_path / "tb").iterdir()
    assert path.name == "train_overall_rank_0.0.pt.trace.json.gz"
    marks = {each["name"]: each for each in events_of(path) if each.get("cat") == "user_annotation"}
    whole, before, steps = (marks[name] for name in ("train_overall", "train_log_probs", "train_actor"))
    assert whole["ts"] <= before["ts"] < before["ts"] + before["dur"] <= steps["ts"]
    assert steps["ts"] + steps["dur"] <= whole["ts"] + whole["dur"]


class FakeCudaMemory:
    """Stands in for torch.cuda.memory, on a machine without a GPU: keeps what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any]] = []
        monkeypatch.setattr(profile, "use_cuda", lambda: True)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", self.dump)

    def record(self, enabled: str | None = "all", **options: Any) -> None:
        self.calls.append(("record", enabled))

    def dump(self, name: str) -> None:
        self.calls.append(("dump", name))


class FakeMemray:
    """Stands in for memray, which is not installed here: a tracker that writes when it begins and when it ends."""

    def __init__(self, file_name: str, native_traces: bool) -> None:
        self._file = Path(file_name)

    def __enter__(self) -> None:
        self._file.open("x").write("begun")

    def __exit__(self, *exception: object) -> None:
        self._file.write_text("ended")


def make_profiler(run_dir: Path, rank: int = 0, **flags: Any) -> Profiler:
    config = Config().replace(record_memory_history=True, **flags)
    context = RoleContext(run_dir, 2, "trainer", rank, "http://127.0.0.1:9", "")
    return Profiler(config.profiling, config.tracking, context)


def test_memory_is_written_after_so_many_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCudaMemory(monkeypatch)
    profiler = make_profiler(tmp_path, memory_snapshot_num_steps=2)
    written = ("dump", str(tmp_path / "profile" / "memory_attempt_2_rank_0.pickle"))
    with profiler.memory():
        for number in range(3):
            assert (written in fake.calls) == (number >= 2)
            with profiler.rollout(number):
                pass
    assert fake.calls == [("record", "all"), written, ("record", None)]


def test_memory_that_runs_out_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCudaMemory(monkeypatch)
    profiler = make_profiler(tmp_path, memory_snapshot_dir=str(tmp_path / "here"))
    with pytest.raises(torch.OutOfMemoryError), profiler.memory():
        raise torch.OutOfMemoryError
    assert [what for what, _ in fake.calls] == ["record", "dump", "record"]
    assert fake.calls[1][1].startswith(str(tmp_path / "here"))


def test_ranks_that_are_not_asked_record_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCudaMemory(monkeypatch)
    with make_profiler(tmp_path, rank=1, profile_ranks=[0]).memory():
        pass
    assert fake.calls == []


def test_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memray", SimpleNamespace(Tracker=FakeMemray))
    file = tmp_path / "profile" / "memory_attempt_2_rank_0.memray"
    for _ in range(2):  # the second is a restart within the attempt
        with make_profiler(tmp_path, memory_recorder="memray").memory():
            assert file.read_text() in ("", "begun")
        assert file.read_text() == "ended"


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [("torch", "this trainer has none"), ("memray", r"needs a package .*pip install memray")],
)
def test_what_cannot_be_recorded_here_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: str, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "memray", None)
    monkeypatch.setattr(profile, "use_cuda", lambda: False)
    with pytest.raises(UserError, match=reason), make_profiler(tmp_path, memory_recorder=recorder).memory():
        raise AssertionError


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--use-pytorch-profiler", "--profile-step-start", "3", "--profile-step-end", "3"], "no rollout is in"),
        (["--use-pytorch-profiler", "--debug-rollout-only"], "--use-pytorch-profiler needs a trainer"),
        (["--record-memory-history", "--debug-rollout-only"], "--record-memory-history needs a trainer"),
    ],
)  # fmt: skip
def test_profiles_that_cannot_be_made(flags: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        arguments.parse(["--hf-checkpoint", "m", "--prompt-data", "p", "--rollout-batch-size", "1",
                         "--num-rollout", "1", *flags])  # fmt: skip
