"""What to run first on a GPU node, part three: weights to another process, and an engine that gives up its memory.

`make test-gpu`. NCCL refuses two processes on one GPU, so that its broadcast needs two GPUs; CUDA IPC, which this
project does not use (docs/gpu.md says why), is tried for whoever wants to add it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOKEN
from helpers.engine import running_requests
from helpers.tiny_model import make_model
from on_gpu import EVERYWHERE, needs_gpu, report, seconds

from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.parallel import Parallel
from rltrain.arguments.groups.weights import Weights
from rltrain.megatron.device import used_memory
from rltrain.run.http import call
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.weights.buckets import Chunk
from rltrain.weights.cuda_threads import finish_work
from rltrain.weights.nccl import nccl_settings
from rltrain.weights.sources import Reader, describe, kept_buffer, source_of
from rltrain.weights.transports.distributed import EngineGroups

pytestmark = pytest.mark.slow

MIB = 2**20
ENGINE = Reader("engine", 0, 1)
_SPAWNS = multiprocessing.get_context("spawn")
Receiver = Callable[[Any, Connection], None]


def in_another_process(receiver: Receiver, what: Any, meanwhile: Callable[[], object] = lambda: None) -> Any:
    """What `receiver`, a function at the top of this module, sends back."""
    ours, theirs = _SPAWNS.Pipe()
    process = _SPAWNS.Process(target=receiver, args=(what, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        meanwhile()
        assert ours.poll(120), "the other process does not answer"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def receive_broadcast(described: dict[str, Any], answer: Connection) -> None:
    """A rank of an engine, on the second GPU with NCCL."""
    if described["backend"] == "nccl":
        torch.cuda.set_device(1)
    source = source_of(described)
    source.read(ENGINE)
    received = source.read(ENGINE)
    finish_work()
    answer.send((str(received.device), received.sum(dtype=torch.int64).item()))
    answer.poll(60)  # the group ends with us, and the sender may still be in it


@pytest.mark.parametrize(
    ("backend", "size"), [("gloo", MIB), pytest.param("nccl", 512 * MIB, marks=needs_gpu)]
)
def test_broadcast_to_an_engine(backend: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--update-weight-transport distributed`: with gloo as with --colocate, with NCCL between two GPUs."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL refuses two processes on one GPU, and torch sees only one")
    for name, value in nccl_settings(Engines(), Weights(), Parallel(), Debug(), os.environ).items():
        monkeypatch.setenv(name, value)
    groups = EngineGroups("127.0.0.1", backend, 0)
    buffer = kept_buffer({}, 0, size, backend)
    buffer.copy_(torch.arange(size, dtype=torch.int64).remainder(251).to(torch.uint8))
    chunks = [Chunk(0, buffer)]
    source = groups.source(chunks)

    def send() -> None:
        groups.broadcast(ENGINE, chunks)
        taken = seconds(lambda: groups.broadcast(ENGINE, chunks))
        report({f"broadcast by {backend}": size / taken / 1e9}, "GB/s")

    device, total = in_another_process(receive_broadcast, json.loads(json.dumps(describe(source))), send)
    assert device == ("cuda:1" if backend == "nccl" else "cpu")
    assert total == buffer.sum(dtype=torch.int64).item()


def receive_tensor(what: tuple[Any, tuple[Any, ...]], answer: Connection) -> None:
    rebuild, arguments = what
    answer.send(rebuild(*arguments).sum(dtype=torch.int64).item())


@pytest.mark.parametrize("where", EVERYWHERE)
def test_memory_of_another_process_can_be_read(where: str) -> None:
    """CUDA IPC, as torch's own sharing of tensors has it; on the CPU that is shared memory."""
    from torch.multiprocessing.reductions import reduce_tensor

    tensor = torch.arange(MIB, dtype=torch.int32, device=where)
    if where == "cuda":
        torch.cuda.synchronize()
        found = in_another_process(receive_tensor, reduce_tensor(tensor))
    else:
        found = in_another_process(receive_tensor, (torch.Tensor.clone, (tensor,)))
    assert found == tensor.sum(dtype=torch.int64).item()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_colocated_engine_gives_up_its_memory(where: str, tmp_path: Path) -> None:
    """Also amid a request: cache and weights go, weights come back and are loaded anew, then the cache."""
    model = make_model(tmp_path / "model")
    server = {"model_path": str(model), "enable_memory_saver": True}
    if where == "cuda":
        server |= {"mem_fraction_static": 0.3, "attention_backend": "triton", "disable_cuda_graph": True}
    with HttpServerEngineAdapter.launch(server, TOKEN) as engine:
        before, answer = used_memory(), _greedy(engine)
        with ThreadPoolExecutor(1) as asking:
            is_amid = False
            while not is_amid:
                held = _paused_amid_a_request(engine, asking)
                for tag in ("kv_cache", "weights"):
                    engine.release_memory(tag)
                without = used_memory()
                engine.resume_memory("weights")
                engine.update_weights_from_disk(model, "1")
                engine.resume_memory("kv_cache")
                is_amid = not held.done()  # else its answer was on the way when the engine paused
                engine.continue_generation()
                assert len(held.result(120)) == 400
        assert _greedy(engine) == answer
        after = used_memory()
    report({"before": before / MIB, "given up": without / MIB, "taken again": after / MIB}, "MiB in use")
    if where == "cuda":
        total = torch.cuda.mem_get_info()[1]
        assert before - without > 0.2 * total and after - without > 0.2 * total


def _paused_amid_a_request(engine: HttpServerEngineAdapter, asking: ThreadPoolExecutor) -> Future[list[int]]:
    """As when the trainer is asked to stop, and saves: SGLang refuses to give up memory while it computes."""
    while True:
        held = asking.submit(_greedy, engine, 400)
        while not running_requests(engine.url, TOKEN) and not held.done():
            pass
        engine.pause_generation()
        if not held.done():
            return held
        engine.continue_generation()  # on a busy machine the answer may be there before


def _greedy(engine: HttpServerEngineAdapter, tokens: int = 8) -> list[int]:
    how = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": [4, 13, 5, 16], "sampling_params": how}
    return call("POST", f"{engine.url}/generate", TOKEN, body, 120)["output_ids"]
