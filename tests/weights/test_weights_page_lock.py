"""Shared memory: another process sees it; it is page-locked while it is mapped. CUDA's runtime is a stand-in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.weights.buckets import Part, lay_out, write
from rltrain.weights.page_lock import lock_pages
from rltrain.weights.sources import Memory, Reader, _mapped
from rltrain.weights.transports.choose import bucket_bytes, make_transport
from rltrain.weights.transports.tensor import SharedMemory, SharedMemoryTransport

FLAGS = ["--prompt-data=/p", "--num-rollout=1", "--rollout-batch-size=8", "--hf-checkpoint=/m"]
REFUSED = 801  # cudaErrorNotSupported
READER = Reader("e", 0, 2)


class FakeCudart:
    """Keeps the ranges that are locked, and sees that none is locked twice or unlocked while it is not."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.locked = status, dict[int, int]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        assert all(
            pointer >= start + length or pointer + size <= start for start, length in self.locked.items()
        )
        if not self.status:
            self.locked[pointer] = size
        return self.status

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0 if self.locked.pop(pointer, None) else REFUSED


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr("rltrain.weights.page_lock._clear_error", lambda: None)
    yield fake
    _mapped.clear()


def test_shared_memory_grows_and_is_seen_by_another_process() -> None:
    memory = SharedMemory()
    memory.grow(100)
    memory.grow(10_000)
    memory.buffer[9_999] = 42
    read = f"print(open({memory.source.path!r}, 'rb').read()[-1])"
    assert subprocess.run([sys.executable, "-c", read], capture_output=True, text=True).stdout == "42\n"
    memory.close()


def test_both_sides_lock_what_is_mapped_and_unlock_it_before_it_is_not(cudart: FakeCudart) -> None:
    memory = SharedMemory()
    memory.grow(1000)
    read = memory.source.read(READER)
    assert cudart.locked == {memory.buffer.data_ptr(): 1000, read.data_ptr(): 1000}
    assert memory.source.read(READER) is read
    memory.grow(5000)
    assert list(cudart.locked.values()) == [1000, 5000]
    again = memory.source.read(READER)
    assert cudart.locked == {memory.buffer.data_ptr(): 5000, again.data_ptr(): 5000}
    memory.buffer[4999] = 7
    assert again[4999] == 7
    smaller = Memory(memory.source.path, memory.name, 100)  # another bucket's, of before
    assert smaller.read(READER) is again
    memory.close()
    assert list(cudart.locked) == [again.data_ptr()]


def test_a_push_works_where_the_driver_refuses(
    cudart: FakeCudart, capsys: pytest.CaptureFixture[str]
) -> None:
    cudart.status = REFUSED
    transport = SharedMemoryTransport()
    transport.connect({"http://e": READER})
    parts = [Part.whole("a", torch.arange(8.0))]
    pieces = lay_out(parts)
    write(parts, pieces, transport.buffer(0, pieces[-1].end))
    source = transport.source(0, [])
    assert torch.equal(pieces[0].of(source.read(READER)), parts[0].data)
    assert "can't be page-locked (CUDA error 801)" in capsys.readouterr().out
    transport.close()


def test_without_a_gpu_nothing_is_locked() -> None:
    lock_pages(torch.zeros(8, dtype=torch.uint8))


def test_colocated_engines_get_broadcasts_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses a group of two processes on one GPU ("Duplicate GPU detected")."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apart, together = (arguments.parse([*FLAGS, *more]) for more in ([], ["--colocate"]))

    def in_order(config: Config) -> bool:
        return make_transport("distributed", config.engines, config.parallel, "127.0.0.1", 0).in_order

    assert in_order(apart) and not in_order(together)  # by NCCL, and not
    assert bucket_bytes("distributed", together) < bucket_bytes("distributed", apart)
