"""The GPUs of this machine that a run may use, asked of nvidia-smi: no torch is imported for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as CUDA_VISIBLE_DEVICES names it: its index, or its UUID.
        memory: bytes.
    """

    name: str
    memory: float


def usable_gpus() -> list[Gpu]:
    """GPUs for the run; none with a torch that is built for CPUs."""
    return [] if torch_is_for_cpus() else local_gpus()


def local_gpus(env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """All GPUs, or those that CUDA_VISIBLE_DEVICES names."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return select_gpus(done.stdout, env.get("CUDA_VISIBLE_DEVICES"))


def select_gpus(table: str, visible: str | None) -> list[Gpu]:
    """Read nvidia-smi's table of index, UUID and MiB.

    Args:
        table: a line a GPU.
        visible: CUDA_VISIBLE_DEVICES. As CUDA does it, whatever follows a name that no GPU has is ignored.
    """
    rows = [[field.strip() for field in line.split(",")] for line in table.splitlines()]
    found = [(row[0], row[1], float(row[2]) * 1024**2) for row in rows if len(row) == 3 and row[2].isdigit()]
    if visible is None:
        return [Gpu(index, memory) for index, _, memory in found]
    gpus: list[Gpu] = []
    for name in filter(None, map(str.strip, visible.split(","))):
        # A part of a GPU (MIG) has a UUID that this table lacks: its memory is at most the smallest GPU's.
        memory = min((memory for *_, memory in found), default=0.0) if name.startswith("MIG-") else None
        for index, uuid, whole in found:
            if name == index or (name.startswith("GPU-") and uuid.startswith(name)):
                memory = whole
        if memory is None:
            break
        gpus.append(Gpu(name, memory))
    return gpus


def torch_is_for_cpus() -> bool:
    """Whether this environment has a torch that is built for CPUs."""
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
