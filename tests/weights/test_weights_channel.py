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

from rltrain.weights import LOADER
from rltrain.weights.channel import _payload
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
    port = groups.source(8).port  # type: ignore[union-attr]
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
