"""Threads of a push on a GPU: which device they use, and what waits for what. CUDA is a stand-in, see FakeCuda."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes.cuda_runtime import FakeCuda

from rltrain.weights import receive
from rltrain.weights.buckets import Bucket, Part, lay_out, message, sample_digests, taken, to_json, write
from rltrain.weights.channel import LOADED, receive_message, send_message
from rltrain.weights.rounds import in_order
from rltrain.weights.session import outcomes
from rltrain.weights.sources import Reader


class Read:
    """Stands in for a broadcast: notes on which device and stream it would run."""

    def __init__(self, buffer: torch.Tensor, log: list) -> None:
        self.buffer, self.log = buffer, log

    def read(self, reader: Reader) -> torch.Tensor:
        self.log.append(("read", (torch.cuda.current_device(), torch.cuda.current_stream().number)))
        return self.buffer


class NotingModel:
    """Stands in for SGLang's model: notes on which device and stream it loads."""

    def __init__(self, log: list) -> None:
        self.log = log

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.log.append(("load", (torch.cuda.current_device(), torch.cuda.current_stream().number)))


def load_on(device: int, patch: pytest.MonkeyPatch) -> FakeCuda:
    """A rank of an engine, on this GPU, is sent two buckets."""
    cuda = FakeCuda(patch, devices=device + 1)
    parts = [Part.whole("a", torch.ones(4))]
    pieces = lay_out(parts)
    buffer = torch.zeros(pieces[-1].end, dtype=torch.uint8)
    write(parts, pieces, buffer)
    patch.setattr(receive, "source_of", lambda source: Read(buffer, cuda.log))
    bucket = Bucket(pieces, sample_digests(pieces, buffer))

    def rank(call: dict) -> None:
        torch.cuda.set_device(device)
        receive.load_weights(NotingModel(cuda.log), [(json.dumps(call), torch.empty(0))])

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        call = {"host": "127.0.0.1", "port": server.getsockname()[1], "key": "", "rank": 0, "ahead": True,
                "engine": "e", "size": 1}  # fmt: skip
        loading = pool.submit(rank, call)
        line, _ = server.accept()
        with line:
            receive_message(line)
            for _ in range(2):
                send_message(line, message(to_json(bucket, {})))
                assert receive_message(line) == LOADED
                cuda.log.append(("reported", None))
            line.shutdown(socket.SHUT_WR)
        loading.result()
    return cuda


def test_weights_are_received_on_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    log = load_on(3, monkeypatch).log
    assert {what[0] for kind, what in log if kind in ("read", "load")} == {3}


def test_loading_waits_for_receiving_and_the_report_for_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    log = load_on(1, monkeypatch).log
    (receiver,) = {what[1] for kind, what in log if kind == "read"}
    (loader,) = {what[1] for kind, what in log if kind == "load"}
    assert receiver != loader  # or a bucket would be loaded after the next had come
    of_loader = [each for each in log if each[0] != "read"]
    one = [("wait", (loader, receiver)), ("load", (1, loader)), ("synchronize", loader), ("reported", None)]
    assert of_loader == one * 2


def test_threads_that_send_use_the_gpu_and_stream_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, devices=6)
    torch.cuda.set_device(5)
    stream = torch.cuda.Stream(5)
    torch.cuda.set_stream(stream)
    seen = []
    outcomes("abc", lambda _: seen.append((torch.cuda.current_device(), torch.cuda.current_stream().number)))
    assert set(seen) == {(5, stream.number)}
    assert not cuda.log


@pytest.mark.parametrize(("count", "engines"), [(1, 3), (2, 2), (3, 5), (8, 3), (5, 8), (8, 8), (16, 16)])
def test_one_queue_a_gpu_is_enough_for_a_round(count: int, engines: int) -> None:
    """Every GPU does one thing after the other, and a broadcast needs both ends: the round comes to its end.

    It does so in the least steps that there can be, as many as those have to do who have most; also where an engine
    has failed, which keeps the others' places.
    """
    everyone = {f"engine {e}": e for e in range(engines)}
    for places in (everyone, {name: e for name, e in everyone.items() if e != 1}):
        senders = {s: [(s, name) for name in in_order(places, s, count)] for s in range(count)}
        takers = {name: [(s, name) for s in taken(e, count)] for name, e in places.items()}
        steps = 0
        while any(senders.values()):
            ready = [queue[0] for queue in senders.values() if queue and takers[queue[0][1]][0] == queue[0]]
            assert ready, f"deadlock: {senders} {takers}"
            for s, name in ready:
                senders[s].pop(0)
                takers[name].pop(0)
            steps += 1
        if places is everyone and max(count, engines) % min(count, engines) == 0:
            assert steps == max(count, engines)
