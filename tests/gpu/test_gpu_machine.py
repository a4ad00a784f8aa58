"""What to run first on a GPU node, part one: devices, streams, and memory between GPU and host. `make test-gpu`.

One GPU, no network, no model to download. Every test for a GPU skips, with the reason, where torch sees none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_gpu import EVERYWHERE, report, seconds

from hpc.supervisor.task import make_spec, task_env
from rltrain.megatron.device import HostSwap, refill, release, restore, store
from rltrain.weights.buckets import Part, lay_out, write
from rltrain.weights.cuda_threads import Mark, finish_work, thread_pool
from rltrain.weights.sources import Reader
from rltrain.weights.transports.tensor import SharedMemoryTransport

MIB = 2**20
ENGINE = Reader("engine", 0, 1)
_SAY_DEVICE = """
from rltrain.megatron import device
device.set_up()
import torch
here = device.device()
name = torch.cuda.get_device_properties(here).uuid if here.type == "cuda" else "none"
print("rank on", here, name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_rank_under_slurm_computes_on_its_gpu(where: str, tmp_path: Path) -> None:
    """Of two ranks that see the same GPUs, and of one that Slurm has bound to the last GPU alone."""
    count = torch.cuda.device_count() if where == "cuda" else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = visible.split(",")[:count]
    spec = json.loads(make_spec("trainer", 0, ["x"], tmp_path, (0, count), ranks=True))
    last = max(count - 1, 0)
    slurm = {"SLURM_PROCID": str(last), "SLURM_LOCALID": str(last), "SLURM_NNODES": "1"}
    slurm |= {"SLURM_NTASKS": str(last + 1)}
    environments = [
        {**os.environ, **slurm, **task_env(spec, {**slurm, "CUDA_VISIBLE_DEVICES": ",".join(seen)})}
        for seen in (names, names[-1:])
    ]
    if where == "cpu":
        assert environments[0] == environments[1]
        assert _said(environments[0]) == "rank on cpu none"
    else:
        said = [_said(env) for env in environments]
        assert said[0].startswith(f"rank on cuda:{last} ") and said[1].startswith("rank on cuda:0 ")
        assert said[0].split()[-1] == said[1].split()[-1]  # the same GPU


def _said(env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", _SAY_DEVICE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("rank on"))


@pytest.mark.parametrize("where", EVERYWHERE)
def test_what_a_thread_receives_is_there_when_it_is_used(where: str) -> None:
    """Without the mark the copy would be read while it is being made."""
    source = torch.arange((64 if where == "cuda" else 1) * MIB, dtype=torch.int32)
    source = source.pin_memory() if where == "cuda" else source
    target = torch.zeros_like(source, device=where)

    def receive() -> Mark:
        target.copy_(source, non_blocking=True)
        return Mark()

    with thread_pool(1, own_streams=True) as pool:
        pool.submit(receive).result().wait()
        total = target.to(torch.float64).sum()
        finish_work()
    assert total.item() == source.to(torch.float64).sum().item()


@pytest.mark.parametrize("where", EVERYWHERE)
def test_offload_and_back(where: str) -> None:
    """The bytes come back, GPU memory is free meanwhile, and the second time takes no new pinned memory."""
    size = (512 if where == "cuda" else 1) * MIB  # bytes of each of two tensors
    weights = [torch.randn(size // 4, device=where) for _ in range(2)]
    expected = [weight.sum().item() for weight in weights]
    zeros = torch.zeros(size // 4, device=where)
    everything = [*weights, zeros]
    if where == "cpu":  # `HostSwap` moves nothing there
        released, stored = release([zeros]), store(weights)
        assert all(not each.untyped_storage().nbytes() for each in everything)
        restore(stored)
        refill(released)
        assert [weight.sum().item() for weight in weights] == expected and not zeros.any()
        return
    swap = HostSwap(lambda: everything, zeros=lambda: [zeros])
    before = torch.cuda.memory_allocated()
    swap.out()
    assert torch.cuda.memory_allocated() <= before - 3 * size
    swap.back()
    out, back = seconds(swap.out), seconds(swap.back)
    assert [weight.sum().item() for weight in weights] == expected and not zeros.any()
    report(_rates(2 * size, {"offload, out": out, "offload, back": back}), "GB/s")
    report(_pinned_rate(2 * size), "GB/s")


@pytest.mark.parametrize("where", EVERYWHERE)
def test_weights_through_shared_memory(where: str) -> None:
    """`--update-weight-transport tensor`, both ways; on a GPU as fast as pinned memory, if it could be page-locked."""
    size = (512 if where == "cuda" else 1) * MIB
    parts = [Part.whole(name, torch.randn(size // 8, device=where)) for name in "ab"]
    pieces = lay_out(parts)
    transport = SharedMemoryTransport()
    transport.connect({"http://engine": ENGINE})
    buffer = transport.buffer(0, pieces[-1].end)
    source = transport.source(0, [])
    write(parts, pieces, buffer)
    received = source.read(ENGINE)
    loaded = [torch.empty_like(part.data) for part in parts]

    def load() -> None:
        for target, piece in zip(loaded, pieces, strict=True):
            target.copy_(piece.of(received))

    sent, got = seconds(lambda: write(parts, pieces, buffer)), seconds(load)
    assert all(torch.equal(part.data, target) for part, target in zip(parts, loaded, strict=True))
    report(_rates(size, {"shared memory, from the trainer": sent, "to the engine": got}), "GB/s")
    if where == "cuda":
        report(_pinned_rate(size), "GB/s")


def _rates(size: int, times: dict[str, float]) -> dict[str, float]:
    return {name: size / taken / 1e9 for name, taken in times.items()}


def _pinned_rate(size: int) -> dict[str, float]:
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    return _rates(size, {"pinned copy": seconds(lambda: pinned.copy_(source))})
