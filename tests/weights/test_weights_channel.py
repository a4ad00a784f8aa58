"""What an engine is asked for a push: it names the loader and nothing that SGLang refuses; and who may listen."""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
import socket
import sys

import pytest
import torch

from rltrain.weights import LOADER, channel
from rltrain.weights.buckets import Chunk
from rltrain.weights.channel import _payload, receive_message
from rltrain.weights.receive import load_weights
from rltrain.weights.transports.distributed import EngineGroups


def test_running_engines_find_the_loader_under_its_name() -> None:
    """They were told it when they started, perhaps by the version before."""
    assert (
        LOADER
        == f"{load_weights.__module__}.{load_weights.__name__}"
        == "rltrain.weights.receive.load_weights"
    )


def test_what_an_engine_is_asked_names_no_function_of_the_trainers_megatron_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # megatron-core 0.17 and later puts one of its own there, which SGLang refuses to call.
    monkeypatch.setattr(torch.storage, "_load_from_bytes", json.loads)
    payload = base64.b64decode(_payload({"port": 1}))
    strings = [argument for _, argument, _ in pickletools.genops(payload) if isinstance(argument, str)]
    modules = {each.partition(".")[0] for each in strings if each.partition(".")[0] in sys.modules}
    assert modules <= {"torch", "multiprocessing", "collections", "builtins"}
    ((call, tensor),) = pickle.loads(payload)
    assert json.loads(call) == {"port": 1} and tensor.numel() == 0


def test_the_store_of_an_engine_group_listens_at_one_address() -> None:
    groups = EngineGroups("127.0.0.1", "gloo", 0)
    port = groups.source([Chunk(0, torch.zeros(8, dtype=torch.uint8))]).port  # type: ignore[union-attr]
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_silent_stranger_is_sent_away_and_a_rank_may_call_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "_HELLO_SECONDS", 0.1)
    heard = []

    def request(payloads: list[str], loader: str) -> None:
        ((text, _),) = pickle.loads(base64.b64decode(payloads[0]))
        told = json.loads(text)
        address = told["host"], told["port"]
        with socket.create_connection(address) as silent:
            heard.append(receive_message(silent))  # there is no rank yet that could end the wait
        monkeypatch.setattr(channel, "_HELLO_SECONDS", 60.0)
        hello = json.dumps({"key": told["key"], "rank": 0}).encode()
        framed = len(hello).to_bytes(8, "little") + hello
        with socket.create_connection(address) as rank:
            rank.sendall(framed[:5])
            rank.sendall(framed[5:])
            heard.append(receive_message(rank))

    opened = channel.Channel(request, "127.0.0.1", ahead=False, name="e", size=1)
    opened.send("a round")
    opened.close()
    assert heard == [None, "a round"]
