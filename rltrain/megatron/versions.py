"""What differs between the versions of megatron-core that are supported, 0.16.1 to 0.19: all of it is here.

Each function says which version each of its ways is for. When support for a version ends, its way goes.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
from packaging.version import Version

from rltrain.run.processes import die_with_parent

# Major and minor number of what is installed; a build from source counts as the version that it leads to.
_INSTALLED = Version(megatron.core.__version__).release[:2]


def experts_builder(linear_fc1: type, linear_fc2: type) -> Any:
    """What `BackendSpecProvider.grouped_mlp_modules` returns for experts that are all in one module.

    Args:
        linear_fc1: The first linear layer of all experts of a rank.
        linear_fc2: The second.
    """
    from megatron.core.transformer.moe import experts

    if _INSTALLED < (0, 17):  # 0.16: the class and its parts
        from megatron.core.transformer.mlp import MLPSubmodules

        return experts.TEGroupedMLP, MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    # 0.17 and later: something to be called
    parts = experts.GroupedMLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    return partial(experts.TEGroupedMLP, submodules=parts)


def with_submodules(spec: Any, **changes: Any) -> Any:
    """The same specification of a module, some of whose submodules are others."""
    if isinstance(spec, partial):  # 0.17 and later: something to be called
        submodules = replace(spec.keywords["submodules"], **changes)
        return partial(spec.func, *spec.args, **{**spec.keywords, "submodules": submodules})
    return replace(spec, submodules=replace(spec.submodules, **changes))  # 0.16


def define_kernel_names() -> None:
    """Define what the router of experts asks for by name, also where there is no TransformerEngine."""
    from megatron.core.transformer.moe import moe_utils

    if _INSTALLED < (0, 17):  # 0.16: it is imported with TransformerEngine only, and asked for without it
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)


def normalises_plain_queries() -> bool:
    """Whether latent attention without compressed queries gets a norm before its projection.

    No published model has one.
    """
    return importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config") is not None  # 0.19


def own_writer() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` that ask for Megatron-core's own writer of files."""
    if _INSTALLED < (0, 17):  # 0.16: there is no other
        return {}
    # 0.17 and later: unless told, another package (nvidia-resiliency-ext) is asked for
    return {"async_strategy": "mcore"}


def prepare_results_queue() -> None:
    """Start the process that serves Megatron-core's queue of what was written, before the first save.

    It is forked: Megatron-core would spawn it, which takes 3 s and imports the main module a second time. It ends
    with this process, however that ends.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with _family:
        if _INSTALLED >= (0, 17):  # as Megatron-LM does it
            filesystem_async.get_write_results_queue("fork")
        elif filesystem_async._results_queue is None:  # 0.16: there is no public way
            filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def write_common_file(checkpoint: Path) -> None:
    """Give a checkpoint that was just written the file in which versions before 0.19 look for what has no shards.

    They can't find it otherwise; 0.19 reads the file too, if there is one. Rank 0 calls it.
    """
    import torch
    from megatron.core import dist_checkpointing

    file = checkpoint / "common.pt"
    if _INSTALLED >= (0, 19) and not file.exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(checkpoint)), file)


class _Family:
    """While entered, processes that this thread forks are killed by the system when this process ends."""

    def __init__(self) -> None:
        self._parent: int | None = None
        os.register_at_fork(after_in_child=self._in_child)  # which nothing can take back, so it is done once

    def __enter__(self) -> None:
        self._parent = os.getpid()

    def __exit__(self, *error: object) -> None:
        self._parent = None

    def _in_child(self) -> None:
        if self._parent is not None:
            die_with_parent(self._parent)


_family = _Family()
