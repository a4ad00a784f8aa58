"""Weights in buckets, and how they come from a trainer's ranks to those of its engines."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any, TypeVar

import pytest
import torch

from rltrain.weights import buckets, session
from rltrain.weights.buckets import (
    Bucket,
    Part,
    Piece,
    Window,
    _gathered_digests,
    from_message,
    in_buckets,
    lay_out,
    message,
    pack,
    sample_digests,
    to_json,
    write,
)
from rltrain.weights.channel import LOADED, call_trainer, receive_message, send_message
from rltrain.weights.cuts import Cuts
from rltrain.weights.delta import change
from rltrain.weights.receive import _load, load_weights
from rltrain.weights.rounds import Rounds
from rltrain.weights.sources import Memory, describe
from rltrain.weights.transports.tensor import SharedMemory, SharedMemoryTransport

T = TypeVar("T")


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
    found = list(in_buckets(iter(named), 400))
    assert [part.name for bucket in found for part in bucket] == [part.name for part in named]
    for bucket in found:
        assert sum(part.data.nbytes for part in bucket) <= 400 or len(bucket) == 1
    assert list(in_buckets([], 400)) == []


def test_tensors_of_all_types_survive_the_flat_buffer() -> None:
    odd, sliced = torch.arange(7, dtype=torch.int8), torch.arange(9.0)[::2]
    bucket = parts([*tensors(3, torch.bfloat16), ("odd", odd), *tensors(2), ("sliced", sliced)])
    pieces, buffer = filled(bucket, start=512)
    described = Bucket(pieces, sample_digests(pieces, buffer), keep="name")
    ((again, source),) = from_message(message(to_json(described, {"path": "p"})))
    assert (again, source) == (described, {"path": "p"})
    for part, piece in zip(bucket, again.pieces, strict=True):
        assert piece.name == part.name and torch.equal(piece.of(buffer), part.data)


def test_a_digest_sees_another_tensor() -> None:
    pieces, buffer = filled(parts([*tensors(2), ("long", torch.arange(1000.0))]))
    before = sample_digests(pieces, buffer)
    long = pieces[2]
    for place in (pieces[1].start, long.start, long.end - 1, (long.start + long.end) // 2 + 10):
        buffer[place] ^= 1
        digests = sample_digests(pieces, buffer)
        assert digests == _gathered_digests(pieces, buffer)  # as on a GPU
        changed = [i for i, digest in enumerate(digests) if digest != before[i]]
        assert changed == [1 if place == pieces[1].start else 2]
        buffer[place] ^= 1
    assert sample_digests((), buffer) == []


def test_large_tensors_are_sent_from_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_APART_BYTES", 120)
    strided = torch.arange(80.0)[::2]
    named = [*tensors(4), ("strided", strided), *tensors(3, torch.bfloat16), ("last", torch.ones(64))]
    whole = parts(named)
    pieces, copied = filled(whole)
    buffer, received = torch.zeros_like(copied), torch.zeros_like(copied)
    chunks, digests = pack(whole, pieces, buffer)
    assert digests == sample_digests(pieces, copied)
    for chunk in chunks:
        received[chunk.start : chunk.start + len(chunk.data)] = chunk.data
    assert torch.equal(received, copied)
    places = {buffer[chunk.start :].data_ptr() for chunk in chunks}
    apart = {chunk.data.data_ptr() for chunk in chunks} - places
    assert apart == {named[i][1].data_ptr() for i in (3, 8)}  # the others go together
    assert len(chunks) == 4


class Model:
    """Stands in for SGLang's model: keeps what it loads, and refuses other shapes."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes, self.loaded = shapes, dict[str, torch.Tensor]()

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            assert tensor.shape == self.shapes[name], f"{name} has shape {tuple(tensor.shape)}"
            self.loaded[name] = tensor.clone()


def called(text: str) -> dict[str, Any]:
    """Whom an engine's rank is told to call."""
    told = json.loads(text)
    return {name: told[name] for name in ("host", "port", "key", "rank")}


class Engine:
    """Stands in for an engine of two ranks in this process, which do as they do inside of SGLang."""

    def __init__(self, url: str, expected: list[tuple[str, torch.Tensor]], dies: bool = False) -> None:
        self.url, self.calls, self._dies = url, list[str](), dies
        self.ranks = [Model({name: tensor.shape for name, tensor in expected}) for _ in range(2)]

    def end_push(self, version: str) -> None:
        self.calls.append(f"end_push {version}")

    def end_weight_update(self) -> None:
        self.calls.append("end_weight_update")

    def tensor_parallel_size(self) -> int:
        return 2

    def begin_push(self, payloads, load_format) -> None:
        self.calls.append("begin_push")
        self.update_weights_from_tensor(payloads, load_format)

    def update_weights_from_tensor(self, payloads, load_format) -> None:
        self.calls.append("update")
        named = [pickle.loads(base64.b64decode(payload)) for payload in payloads]
        if self._dies:
            for ((text, _),) in named:
                call_trainer(**called(text)).close()
            raise ConnectionResetError("it has died")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(load_weights, self.ranks, named))


class OneRank:
    """The only rank of a trainer."""

    rank = 0

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value


def push(version: int, given: list[Part], *engines: Engine, bucket_bytes: int = 300) -> dict[str, str]:
    transport = SharedMemoryTransport()
    rounds = in_buckets(given, bucket_bytes)
    try:
        return Rounds(transport, OneRank(), "127.0.0.1").send(version, engines, rounds)  # type: ignore[arg-type]
    finally:
        transport.close()


def test_all_ranks_of_all_engines_get_every_tensor_and_then_the_version() -> None:
    named = tensors()
    engines = [Engine("http://a", named), Engine("http://b", named)]
    for version in (1, 2):
        assert push(version, parts(named), *engines) == {}
    for engine in engines:
        once = ["begin_push", "update", "end_push 1"]
        assert engine.calls == [*once, *(call.replace("1", "2") for call in once)]
        for model in engine.ranks:
            assert model.loaded.keys() == {name for name, _ in named}
            assert all(torch.equal(model.loaded[name], tensor) for name, tensor in named)


class OneOfFour:
    """A rank of a trainer whose ranks are threads."""

    meet, values = Barrier(4, timeout=60), [None] * 4

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, value: T) -> list[T]:
        self.values[self.rank] = value  # type: ignore[call-overload]
        self.meet.wait()
        found = list(self.values) if self.rank == 0 else []
        self.meet.wait()
        return found  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        found = self.gather(value)
        self.values[0] = found[0] if self.rank == 0 else self.values[0]
        self.meet.wait()
        value = self.values[0]  # type: ignore[assignment]
        self.meet.wait()
        return value


def push_of_four(engines: list[Engine], own: dict[int, list[list[Part]]], one_queue: bool = False) -> None:
    """Each rank has rounds of its own."""

    def run(rank: int) -> dict[str, str]:
        transport = SharedMemoryTransport()
        try:
            transport.in_order = one_queue
            rounds = Rounds(transport, OneOfFour(rank), "127.0.0.1")
            return rounds.send(1, engines if rank == 0 else [], own.get(rank, []))  # type: ignore[arg-type]
        finally:
            transport.close()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [{}] * 4


@pytest.mark.parametrize("one_queue", [False, True])
def test_engines_begin_with_the_buckets_of_different_senders(one_queue: bool) -> None:
    """Ranks 0 and 3 have weights: each is the first for as many engines as the other, or one more."""
    named = tensors(2)
    engines = [Engine(f"http://{name}", named) for name in "abcd"]

    push_of_four(engines, {0: [parts(named[:1])], 3: [parts(named[1:])]}, one_queue)
    firsts = [[next(iter(model.loaded)) for model in engine.ranks] for engine in engines]
    assert firsts == [["layer.0"] * 2, ["layer.1"] * 2] * 2


def cut(named: list[tuple[str, torch.Tensor]], window: Window) -> list[Part]:
    return [part for each in named if (part := Part.cut(*each, window)) is not None]


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_what_several_ranks_send_of_a_tensor_is_put_together(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in one request, or some in the next."""
    monkeypatch.setattr(session, "_CHANNEL_SECONDS", seconds)
    named = [*tensors(), ("one", torch.ones(1)), ("fp8", torch.ones(9, 3).to(torch.float8_e4m3fn))]
    edges = [0, 3, 40, 41, 90, 100]
    windows = [cut(named, Window(a, b, 100)) for a, b in itertools.pairwise(edges)]
    assert sum(part.data.nbytes for parts in windows for part in parts) == sum(t.nbytes for _, t in named)
    engines = [Engine("http://a", named), Engine("http://b", named)]
    push_of_four(engines, {1: windows[:2], 0: windows[2:4], 3: windows[4:]})
    for model in [model for engine in engines for model in engine.ranks]:
        assert model.loaded.keys() == {name for name, _ in named}
        assert all(torch.equal(model.loaded[name].float(), tensor.float()) for name, tensor in named)


def test_parts_of_a_push_that_has_failed_are_forgotten() -> None:
    (old,), (new,) = ([("w", torch.full((6,), value))] for value in (1.0, 2.0))
    cuts = Cuts()

    def add(tensor: tuple[str, torch.Tensor], start: int, end: int) -> torch.Tensor | None:
        (piece,), buffer = filled(cut([tensor], Window(start, end, 6)))
        return cuts.add(piece, buffer)

    cuts.begin("engine")
    assert add(old, 0, 4) is None
    cuts.begin("the same engine, after it has failed")
    assert add(new, 4, 6) is None
    whole = add(new, 0, 4)
    assert whole is not None and torch.equal(whole, new[1])


def test_an_engine_that_fails_is_named_and_stays_paused_and_the_others_go_on() -> None:
    named = tensors()
    other_shape = [*named[:5], ("layer.5", torch.ones(1)), *named[6:]]
    engines = [
        Engine("http://other", other_shape),
        Engine("http://good", named),
        Engine("http://dead", named, True),
    ]
    failures = push(1, parts(named), *engines)
    assert failures.keys() == {"http://other", "http://dead"}
    assert (
        "http://other: layer.5 to layer.5 can't be loaded: AssertionError: layer.5 has"
        in failures["http://other"]
    )
    assert "closed the connection" in failures["http://dead"] or "died" in failures["http://dead"]
    # One that is there can be asked again; it does not generate with what it has.
    assert [engine.calls[-1] for engine in engines] == ["end_weight_update", "end_push 1", "update"]
    assert engines[1].ranks[0].loaded.keys() == {name for name, _ in named}


def test_a_loader_that_overwrites_what_it_is_given_leaves_other_ranks_theirs() -> None:
    class Overwrites(Model):
        """As SGLang's gpt-oss on all ranks but one."""

        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
            super().load_weights(weights)
            for _, tensor in weights:
                tensor.zero_()

    named = [("model.layers.0.mlp.experts.down_proj_bias", torch.arange(1.0, 7.0).view(2, 3))]
    pieces, buffer = filled(parts(named))
    bucket = Bucket(pieces, sample_digests(pieces, buffer))
    for kind in (Overwrites, Model):
        model = kind({name: tensor.shape for name, tensor in named})
        assert _load(model, bucket, buffer) == LOADED
        assert torch.equal(model.loaded[named[0][0]], named[0][1])


def test_a_channel_is_opened_anew_when_it_has_held_the_engine_up_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "_CHANNEL_SECONDS", 0.0)
    engine = Engine("http://a", tensors())
    assert push(1, parts(tensors()), engine) == {}
    assert engine.calls.count("update") > 3
    assert [call for call in engine.calls if "1" in call] == engine.calls[-1:] == ["end_push 1"]
    assert engine.ranks[1].loaded.keys() == {name for name, _ in tensors()}


def test_strangers_are_not_told_anything() -> None:
    """Whoever calls without the key is sent away, or says nothing, and the engine's ranks are waited for."""

    class Beset(Engine):
        def update_weights_from_tensor(self, payloads, load_format) -> None:
            ((text, _),) = pickle.loads(base64.b64decode(payloads[0]))
            where = called(text)
            silent = socket.create_connection((where["host"], where["port"]))
            for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]"):
                rude = socket.create_connection((where["host"], where["port"]))
                rude.sendall(said)
                assert receive_message(rude) is None
            stranger = call_trainer(**(where | {"key": "wrong"}))
            assert receive_message(stranger) is None
            super().update_weights_from_tensor(payloads, load_format)
            assert receive_message(silent) is None

    engine = Beset("http://a", tensors())
    assert push(1, parts(tensors()), engine) == {}
    assert engine.ranks[0].loaded


def report(model: Model, bucket: Bucket, source: Memory) -> str | None:
    """What a rank says that is told of one bucket."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        call = {"host": "127.0.0.1", "port": server.getsockname()[1], "key": "", "rank": 0, "ahead": False,
                "engine": "e", "size": 1}  # fmt: skip
        loading = pool.submit(load_weights, model, [(json.dumps(call), torch.empty(0))])
        line, _ = server.accept()
        with line:
            receive_message(line)
            send_message(line, message(to_json(bucket, describe(source))))
            line.shutdown(socket.SHUT_WR)
            words = receive_message(line)
        loading.result()
    return words


def test_what_is_wrong_is_said() -> None:
    named = tensors()
    memory = SharedMemory()
    memory.grow(10_000)
    pieces = lay_out(parts(named), start=512)
    write(parts(named), pieces, memory.buffer)
    bucket = Bucket(pieces, sample_digests(pieces, memory.buffer))
    model = Model({name: torch.Size([1]) for name, _ in named})
    wrong = "layer.0 to layer.6 can't be loaded: AssertionError: layer.0 has shape (5, 4)"
    assert wrong in str(report(model, bucket, memory.source))
    unseen = "shared memory is not visible from here"
    assert unseen in str(report(model, bucket, replace(memory.source, name="of-another-machine")))
    assert unseen in str(report(model, bucket, replace(memory.source, path="/proc/1/fd/999999")))
    model.shapes = {name: tensor.shape for name, tensor in named}
    other = replace(bucket, digests=[*bucket.digests[:-1], 7])
    assert report(model, other, memory.source) == "layer.6 has a checksum other than the trainer's"
    assert not model.loaded
    assert report(model, bucket, memory.source) == LOADED
    memory.close()


def test_changes_to_what_is_not_known_are_refused() -> None:
    """As an engine would that the trainer takes for another one."""
    part = change("w", torch.zeros(100), torch.arange(100) // 99 * 1.0)
    assert part is not None and part.changed is not None
    engine = Engine("http://a", [("w", torch.zeros(100))])
    failures = push(2, [part], engine)
    assert "only changes of w arrived, and the values that they apply to are unknown" in failures["http://a"]
    assert not engine.ranks[0].loaded
