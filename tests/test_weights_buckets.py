"""Weights in buckets, and shared memory between two processes of one machine."""

from __future__ import annotations

import subprocess
import sys

import torch

from rltrain.weights.buckets import from_json, in_buckets, lay_out, sample_digest, to_json, write
from rltrain.weights.receive import LOADED, load_shared_memory, read_report
from rltrain.weights.tensor import SharedMemory, TensorTransport


def tensors(count: int = 7, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(f"layer.{i}", torch.randn(5 + i, 4, generator=generator).to(dtype)) for i in range(count)]


def test_buckets_keep_order_and_bound() -> None:
    named = [*tensors(), ("huge", torch.zeros(1000)), *tensors(3, torch.bfloat16)]
    buckets = list(in_buckets(iter(named), 400))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in named]
    for bucket in buckets:
        assert len({tensor.dtype for _, tensor in bucket}) == 1
        assert sum(tensor.nbytes for _, tensor in bucket) <= 400 or len(bucket) == 1
    assert list(in_buckets([], 400)) == []


def test_tensors_survive_the_flat_buffer() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bucket = tensors(4, dtype)
        pieces = lay_out(bucket, start=512)
        buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
        write(bucket, pieces, buffer)
        digests = [sample_digest(piece, buffer) for piece in pieces]
        again, same, fields = from_json(to_json(pieces, digests, path="p"))
        assert (again, same, fields) == (list(pieces), digests, {"path": "p"})
        for (name, tensor), piece in zip(bucket, again, strict=True):
            assert piece.name == name and torch.equal(piece.of(buffer), tensor)


def test_a_digest_sees_another_tensor() -> None:
    bucket = tensors(2)
    pieces = lay_out(bucket)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(bucket, pieces, buffer)
    before = sample_digest(pieces[1], buffer)
    buffer[pieces[1].start] ^= 1
    assert sample_digest(pieces[1], buffer) != before


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
    """Stands in for an engine of two ranks in this process; `lost` digests do not match, so often."""

    def __init__(self, url: str, expected: list[tuple[str, torch.Tensor]], lost: int = 0) -> None:
        self.url, self.calls, self.lost = url, list[str](), lost
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
        for model, payload in zip(self.ranks, payloads, strict=True):
            ((text, empty),) = pickle.loads(base64.b64decode(payload))
            fields = json.loads(text)
            if self.lost and fields["pieces"] and model is self.ranks[1]:
                self.lost -= 1
                fields["digests"][-1] += 1
            load_shared_memory(model, [(json.dumps(fields), empty)])


def test_all_ranks_of_all_engines_get_every_tensor_and_then_the_version() -> None:
    named = tensors()
    engines = [Engine("http://a", named), Engine("http://b", named, lost=1)]
    transport = TensorTransport(300)
    for version in (1, 2):
        transport.push(version, iter(named), lambda: engines)
    transport.close()
    for engine in engines:
        assert engine.calls[:2] == ["pause_generation", "begin_weight_update"]
        assert engine.calls[-3:] == ["update 2", "end_weight_update", "continue_generation"]
        for model in engine.ranks:
            assert model.loaded.keys() == {name for name, _ in named}
            assert all(torch.equal(model.loaded[name], tensor) for name, tensor in named)
    # One bucket came twice to the engine that had found a wrong checksum.
    assert engines[1].calls.count("update None") == engines[0].calls.count("update None") + 1


def test_a_tensor_that_is_wrong_twice_is_named_and_the_engine_stays_paused() -> None:
    named = tensors()
    engine = Engine("http://a", named, lost=99)
    transport = TensorTransport(10_000)
    try:
        transport.push(1, iter(named), lambda: [engine])
    except RuntimeError as error:
        assert "http://a: layer.6 has another checksum" in str(error)
    else:
        raise AssertionError("nothing was noticed")
    assert "continue_generation" not in engine.calls
    transport.close()


def test_another_model_and_another_machine_are_told_apart() -> None:
    named = tensors()
    memory = SharedMemory()
    memory.grow(10_000)
    pieces = lay_out(named, start=512)
    write(named, pieces, memory.buffer)
    digests = [sample_digest(piece, memory.buffer) for piece in pieces]
    model = Model({name: torch.Size([1]) for name, _ in named})

    def report(**fields: object) -> str:
        memory.buffer[:512] = 0
        where = {"path": memory.path, "name": memory.name, "size": 10_000, "reader": 0, **fields}
        load_shared_memory(model, [(to_json(pieces, digests, **where), torch.empty(0))])
        return read_report(memory.buffer, 0)

    assert "layer.0 to layer.6 can't be loaded: AssertionError: layer.0 has shape (5, 4)" in report()
    assert report(name="slurmlime-weights-of-another-machine") == ""
    assert report(path="/proc/1/fd/999999") == ""
    model.shapes = {name: tensor.shape for name, tensor in named}
    assert report() == LOADED
    memory.close()
