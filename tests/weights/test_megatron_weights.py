"""Weights on disk for the engines, with a stand-in that records what an engine is told."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from helpers.engine import GivenWeights
from helpers.megatron import init_single_process, make_actor, make_config, tiny_config, write_hf_model
from safetensors.torch import load_file

from rltrain.megatron.push import WeightPush
from rltrain.run.role import RoleContext
from rltrain.weights.transports import hf_directory
from rltrain.weights.transports.current import current_weights, weight_version

pytestmark = pytest.mark.slow


class Engine:
    """An external one, which loads directories by itself."""

    is_ours = is_here = False

    def __init__(self, url: str = "http://a", error: Exception | None = None, dead: bool = False) -> None:
        self.url, self.calls = url, list[str]()
        self.loaded: dict[str, torch.Tensor] = {}
        self._error, self._dead = error, dead

    def has_died(self) -> bool:
        return self._dead

    def pause_generation(self) -> None:
        self.calls.append("pause")

    def update_weights_from_disk(self, path: str, weight_version: str) -> None:
        if self._error:
            raise self._error
        self.loaded = load_file(Path(path) / "model.safetensors")
        self.calls.append(f"update {weight_version}")

    def continue_generation(self) -> None:
        self.calls.append("continue")

    def expel(self, reason: str) -> None:
        self.calls.append(f"expel: {reason}")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    init_single_process()
    return write_hf_model(tmp_path_factory.mktemp("model"), tiny_config())


def test_every_engine_loads_and_old_versions_go(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "tokenizer.json").write_text("{}")
    actor = make_actor(make_config(model_dir, update_weight_transport="disk"), tmp_path)
    engines = [Engine(), Engine("http://b")]
    for version in (10, 11, 12):
        actor.update_weights(lambda: engines, version)
    for engine in engines:
        assert engine.calls[6:] == ["pause", "update 12", "continue"]
        assert all(
            torch.equal(engine.loaded[k], v) for k, v in load_file(model_dir / "model.safetensors").items()
        )
    root = tmp_path / "weights"
    # The one before stays for an engine that was started again and may be reading it.
    assert {path.name for path in root.iterdir()} == {"v000011", "v000012", "current"}
    assert current_weights(root) == root / "v000012" and weight_version(root / "v000012") == 12
    assert (root / "v000012" / "tokenizer.json").exists() and (root / "v000012" / "config.json").exists()
    assert actor._registry.events[-1] == ("weights_updated", {"version": 12})


def weight_push(run_dir: Path, model_dir: Path, events: list[tuple[str, dict[str, object]]]) -> WeightPush:
    config = make_config(model_dir, update_weight_transport="disk")
    context = RoleContext(run_dir, 0, "trainer", 0, "http://127.0.0.1:9", "token")
    weights = GivenWeights(lambda: [("a", torch.zeros(2))], model_dir)
    return WeightPush(config, context, weights, lambda kind, **fields: events.append((kind, fields)))


def test_an_engine_that_fails_twice_is_ended_and_the_others_go_on(tmp_path: Path, model_dir: Path) -> None:
    good, bad = Engine("http://good"), Engine("http://bad", RuntimeError("no space"))
    events: list[tuple[str, dict[str, object]]] = []
    pushing = weight_push(tmp_path, model_dir, events)
    pushing.push(lambda: [bad, good], 1)
    assert good.calls == ["pause", "update 1", "continue"]  # once
    assert bad.calls == [*["pause", "continue"] * 2, "expel: http://bad: no space"]
    assert events == [("weights_not_taken", {"url": "http://bad", "reason": "http://bad: no space"})]
    with pytest.raises(RuntimeError, match="no engine could take the weights: http://bad: no space"):
        pushing.push(lambda: [bad], 2)


def test_an_engine_that_dies_meanwhile_is_left_to_its_successor(tmp_path: Path, model_dir: Path) -> None:
    dead = Engine(error=URLError(ConnectionResetError()), dead=True)
    weights = tmp_path / "weights"

    def find_engines() -> list[Engine]:
        assert current_weights(weights) in (None, weights / "v000001")  # else a successor could miss it
        return [dead]

    weight_push(tmp_path, model_dir, []).push(find_engines, 1)
    assert current_weights(weights) == weights / "v000001"


def test_nothing_is_written_without_engines_to_read_it(model_dir: Path, tmp_path: Path) -> None:
    make_actor(make_config(model_dir, debug_train_only=True), tmp_path).update_weights(list, 1)
    assert not (tmp_path / "weights").exists()


def test_large_models_are_written_in_shards(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf_directory, "_SHARD_BYTES", 10_000)
    make_actor(make_config(model_dir), tmp_path).export(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    ours, original = (
        AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (tmp_path / "out", model_dir)
    )
    assert all(torch.equal(ours[name], original[name]) for name in original)
    # and they are read back, which is also how a run starts from a sharded model
    again = make_actor(make_config(model_dir, load=str(tmp_path / "out")), tmp_path)
    assert torch.equal(
        dict(again.models[0].named_parameters())["output_layer.weight"], original["lm_head.weight"]
    )


def test_an_unfinished_directory_has_another_name(tmp_path: Path, model_dir: Path) -> None:
    def broken():  # type: ignore[no-untyped-def]
        yield "a", torch.zeros(2)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        hf_directory.write_hf_directory(tmp_path / "out", broken(), model_dir)
    assert not (tmp_path / "out").exists()
    hf_directory.write_hf_directory(tmp_path / "out", [("a", torch.ones(2))], model_dir)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [1.0, 1.0]


def test_safetensors_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_directory, "_HEADER_BYTES", 1000)  # room for few
    whole = torch.arange(24.0).view(4, 6)
    tensors = [
        ("rows", whole[1:3]),
        ("columns", whole[:, 2:4]),
        ("again", whole),
        ("half", torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16)),
        ("number", torch.tensor(3.0)),
        ("nothing", torch.zeros(0, 5)),
        ("long" * 20, torch.ones(2, dtype=torch.float16)),
    ]
    written = hf_directory.write_weights(tmp_path, iter(tensors), writer=3)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 1 and {path.name for path in files} == set(written.file_of.values())
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert read.keys() == {name for name, _ in tensors}
    for name, tensor in tensors:
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert written.nbytes == sum(tensor.nbytes for _, tensor in tensors)
    pieces = {piece.name: piece for path in files for piece in hf_directory.pieces_of(path)}
    data = (tmp_path / written.file_of["rows"]).read_bytes()
    assert data[pieces["rows"].start : pieces["rows"].end] == whole[1:3].numpy().tobytes()
