"""Weights in buckets, and shared memory between two processes of one machine."""

from __future__ import annotations

import subprocess
import sys

import torch

from rltrain.weights.buckets import (
    Part,
    Piece,
    from_json,
    in_buckets,
    lay_out,
    sample_digests,
    to_json,
    write,
)
from rltrain.weights.delta import change
from rltrain.weights.receive import LOADED, load_weights
from rltrain.weights.sources import Memory, describe
from rltrain.weights.tensor import SharedMemory, TensorTransport, read_report
from rltrain.weights.update import Update


def tensors(count: int = 7, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(f"layer.{i}", torch.randn(5 + i, 4, generator=generator).to(dtype)) for i in range(count)]


def parts(named: list[tuple[str, torch.Tensor]]) -> list[Part]:
    return [Part.whole(name, tensor) for name, tensor in named]


def filled(bucket: list[Part], start: int = 0) -> tuple[tuple[Piece, ...], torch.Tensor]:
    pieces = lay_out(bucket, start)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    return pieces, buffer


def test_buckets_keep_order_and_bound() -> None:
    named = parts([*tensors(), ("huge", torch.zeros(1000)), *tensors(3, torch.bfloat16)])
    buckets = list(in_buckets(iter(named), 400))
    assert [part.name for bucket in buckets for part in bucket] == [part.name for part in named]
    for bucket in buckets:
        assert sum(part.data.nbytes for part in bucket) <= 400 or len(bucket) == 1
    assert list(in_buckets([], 400)) == []


def test_tensors_of_all_types_survive_the_flat_buffer() -> None:
    odd = torch.arange(7, dtype=torch.int8)
    bucket = parts(
        [*tensors(3, torch.bfloat16), ("odd", odd), *tensors(2), ("sliced", torch.arange(9.0)[::2])]
    )
    pieces, buffer = filled(bucket, start=512)
    digests = sample_digests(pieces, buffer)
    again, same, fields = from_json(to_json(pieces, digests, path="p"))
    assert (again, same, fields) == (list(pieces), digests, {"path": "p"})
    for part, piece in zip(bucket, again, strict=True):
        assert piece.name == part.name and torch.equal(piece.of(buffer), part.data)


def test_a_digest_sees_another_tensor() -> None:
    pieces, buffer = filled(parts([*tensors(2), ("long", torch.arange(1000.0))]))
    before = sample_digests(pieces, buffer)
    for place in (
        pieces[1].start,
        pieces[2].start,
        pieces[2].end - 1,
        (pieces[2].start + pieces[2].end) // 2 + 10,
    ):
        buffer[place] ^= 1
        changed = [i for i, digest in enumerate(sample_digests(pieces, buffer)) if digest != before[i]]
        assert changed == [1 if place == pieces[1].start else 2]
        buffer[place] ^= 1
    assert sample_digests((), buffer) == []


def test_shared_memory_grows_and_is_seen_by_another_process() -> None:
    memory = SharedMemory()
    memory.grow(100)
    memory.grow(10_000)
    memory.buffer[9_999] = 42
    read = f"print(open({memory.path!r}, 'rb').read()[-1])"
    assert subprocess.run([sys.executable, "-c", read], capture_output=True, text=True).stdout == "42\n"
    memory.close()


class Model:
    """Stands in for SGLang's model: keeps what it loads, and refuses other shapes."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes, self.loaded = shapes, dict[str, torch.Tensor]()

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            assert tensor.shape == self.shapes[name], f"{name} has shape {tuple(tensor.shape)}"
            self.loaded[name] = tensor.clone()


class Engine:
    """Stands in for an engine of two ranks in this process; so many digests do not match, or calls succeed."""

    def __init__(
        self, url: str, expected: list[tuple[str, torch.Tensor]], lost: int = 0, calls_left: int = 999
    ) -> None:
        self.url, self.calls, self.lost, self.calls_left = url, list[str](), lost, calls_left
        self.ranks = [Model({name: tensor.shape for name, tensor in expected}) for _ in range(2)]

    def __getattr__(self, name: str) -> object:
        return lambda: self.calls.append(name)

    def tensor_parallel_size(self) -> int:
        return 2

    def update_weights_from_tensor(self, payloads, load_format, weight_version=None) -> None:
        import base64
        import json
        import pickle

        self.calls.append(f"update {weight_version}")
        self.calls_left -= 1
        if self.calls_left < 0:
            raise ConnectionResetError("it has died")
        for model, payload in zip(self.ranks, payloads, strict=True):
            ((text, empty),) = pickle.loads(base64.b64decode(payload))
            fields = json.loads(text)
            if self.lost and fields["pieces"] and model is self.ranks[1]:
                self.lost -= 1
                fields["digests"][-1] += 1
            load_weights(model, [(json.dumps(fields), empty)])


def test_all_ranks_of_all_engines_get_every_tensor_and_then_the_version() -> None:
    named = tensors()
    engines = [Engine("http://a", named), Engine("http://b", named, lost=1)]
    transport = TensorTransport(300)
    for version in (1, 2):
        assert transport.push(Update.of(version, named), lambda: engines) == {}
    transport.close()
    for engine in engines:
        assert engine.calls[:2] == ["pause_generation", "begin_weight_update"]
        assert engine.calls[-3:] == ["update 2", "end_weight_update", "continue_generation"]
        for model in engine.ranks:
            assert model.loaded.keys() == {name for name, _ in named}
            assert all(torch.equal(model.loaded[name], tensor) for name, tensor in named)
    # One bucket came twice to the engine that had found a wrong checksum.
    assert engines[1].calls.count("update None") == engines[0].calls.count("update None") + 1


def test_an_engine_that_fails_is_named_and_stays_paused_and_the_others_go_on() -> None:
    named = tensors()
    engines = [
        Engine("http://wrong", named, lost=99),
        Engine("http://good", named),
        Engine("http://dead", named, calls_left=1),
    ]
    transport = TensorTransport(300)
    failures = transport.push(Update.of(1, named), lambda: engines)
    transport.close()
    assert failures.keys() == {"http://wrong", "http://dead"}
    assert "http://wrong: layer.2 has another checksum" in failures["http://wrong"]
    assert failures["http://dead"] == "it has died"
    assert [engine.calls[-1] for engine in engines] == ["update None", "continue_generation", "update None"]
    assert engines[1].ranks[0].loaded.keys() == {name for name, _ in named}


def test_another_model_and_another_machine_are_told_apart() -> None:
    named = tensors()
    memory = SharedMemory()
    memory.grow(10_000)
    pieces = lay_out(parts(named), start=512)
    write(parts(named), pieces, memory.buffer)
    digests = sample_digests(pieces, memory.buffer)
    model = Model({name: torch.Size([1]) for name, _ in named})

    def report(path: str = memory.path, name: str = memory.name) -> str:
        memory.buffer[:512] = 0
        source = describe(Memory(path, name, 10_000, reader=0))
        load_weights(model, [(to_json(pieces, digests, source=source, keep=None), torch.empty(0))])
        return read_report(memory, 0)

    assert "layer.0 to layer.6 can't be loaded: AssertionError: layer.0 has shape (5, 4)" in report()
    assert report(name="slurmlime-weights-of-another-machine") == ""
    assert report(path="/proc/1/fd/999999") == ""
    model.shapes = {name: tensor.shape for name, tensor in named}
    assert report() == LOADED
    memory.close()


def test_changes_to_what_is_not_known_are_refused() -> None:
    """As an engine would that the trainer takes for another one."""
    part = change("w", torch.zeros(100), torch.arange(100) // 99 * 1.0)
    assert part is not None and part.changed is not None
    engine = Engine("http://a", [("w", torch.zeros(100))])
    transport = TensorTransport(1000)
    failures = transport.push(Update(2, [part], is_whole=False), lambda: [engine])
    transport.close()
    assert "only changes of w came, and what they were made to is not known" in failures["http://a"]
    assert not engine.ranks[0].loaded
