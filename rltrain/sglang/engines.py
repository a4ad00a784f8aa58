"""The engines of a job as the trainer finds them, and whether they serve the model that it trains.

Engines are looked up again each time, because one that died is started again.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rltrain.arguments.external import external_token, external_urls
from rltrain.arguments.fleet import trained_engines
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.model import Model
from rltrain.run.errors import UserError
from rltrain.run.files import read_object
from rltrain.run.role import Registry, RoleAddress
from rltrain.sglang.adapter import HttpServerEngineAdapter

if TYPE_CHECKING:
    from rltrain.arguments.hf_config import ModelShape

# The supervisor sees a dead process within a second or two.
_DEATH_SECONDS = 30.0
_POLL_SECONDS = 0.2
# The weights do not depend on these.
_UNIMPORTANT = {"max_positions", "init_std"}
_sizes: dict[tuple[str, int], int] = {}  # by URL and process id of the role


class JobEngine(HttpServerEngineAdapter):
    """One engine of the job, at the address that it has now."""

    def __init__(self, address: RoleAddress, token: str, registry: Registry) -> None:
        super().__init__(address.url, token)
        self._registry, self._pid = registry, address.pid
        self.is_here = address.host == socket.gethostname()

    def tensor_parallel_size(self) -> int:
        """See `HttpServerEngineAdapter`; asked once, although engines are looked up for every push."""
        process = self.url, self._pid
        if process not in _sizes:
            _sizes[process] = super().tensor_parallel_size()
        return _sizes[process]

    def has_died(self) -> bool:
        """Whether the supervisor says so; waits, because an engine that does not answer may be about to die."""
        deadline = time.monotonic() + _DEATH_SECONDS
        while any(address.url == self.url for address in self._registry.find("engine")):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def expel(self, reason: str) -> None:
        """Have its own role end it; the supervisor then starts another one."""
        self._registry.offer(expulsion(self.url, self._pid), reason)


def expulsion(url: str, pid: int) -> str:
    """Name of the offer by which the role of this process id learns why it has to end the engine at `url`."""
    return f"expelled-{pid}-{urlsplit(url).netloc}"


class ExternalEngine(HttpServerEngineAdapter):
    """An engine that the job does not start."""

    is_ours = False
    is_here = False

    def has_died(self) -> bool:
        """Whether it is gone; `rltrain.sglang.external` gives it the weights when it comes back."""
        return not self.makes_progress()

    def expel(self, reason: str) -> None:
        """Nothing: without the current weights `rltrain.sglang.external` takes it off the router."""


def find_engines(
    engines: Engines, debug: Debug, registry: Registry, token: str
) -> list[JobEngine | ExternalEngine]:
    """The engines that are ready now and take the trainer's weights: the job's by index, then external ones."""
    trained = trained_engines(engines, debug)
    own = [
        JobEngine(address, token, registry) for address in registry.find("engine") if address.index in trained
    ]
    return [*own, *(engine for engine in external_engines(engines) if engine.makes_progress())]


def external_engines(engines: Engines) -> list[ExternalEngine]:
    """The external engines that are named now, whether they answer or not."""
    if not engines.are_external:
        return []
    token = external_token()
    return [ExternalEngine(url, token) for url in external_urls(engines)]


def check_engine(model: Model, engine: HttpServerEngineAdapter) -> list[str]:
    """Check that the engine can take the trainer's weights, when it is met for the first time.

    Returns:
        Differences that do no harm, in words.

    Raises:
        UserError: the model has another shape or vocabulary; says what differs.
    """
    # Imported late: engines and the rollout process import this module and need no shapes.
    from rltrain.arguments.hf_config import read_model_shape

    info = engine.get_model_info()
    ours, path = _config(Path(model.hf_checkpoint)), Path(info["model_path"])
    if ours is None:
        return []
    notes = []
    if info.get("architectures") not in (None, ours.get("architectures")):
        raise UserError(
            f"the engine {engine.url} serves {path}, a {info['architectures']}, but the trainer trains"
            f" {model.hf_checkpoint}, a {ours.get('architectures')}. Start it with that model."
        )
    theirs = _config(path)
    if theirs is None:
        notes.append(
            f"the engine {engine.url} serves {path}, which can't be read from here: its shape is not checked"
        )
    elif differences := shape_differences(read_model_shape(ours), read_model_shape(theirs)):
        raise UserError(
            f"the engine {engine.url} serves {path}, which differs from the trainer's {model.hf_checkpoint}:"
            f" {'; '.join(differences)}. The weights of one do not fit the other: start the engine with that model."
        )
    return notes + dtype_notes(model, engine)


def shape_differences(ours: ModelShape, theirs: ModelShape) -> list[str]:
    """What is different, with both values; a padded vocabulary is explained."""
    differences = []
    for field in dataclasses.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other and field.name not in _UNIMPORTANT:
            padded = " (it is padded differently)" if field.name == "vocab_size" else ""
            differences.append(f"{field.name} is {other} there and {mine} here{padded}")
    return differences


def dtype_notes(model: Model, engine: HttpServerEngineAdapter) -> list[str]:
    """That weights are converted on their way, if the engine computes with another type than the trainer."""
    trainer = "bfloat16" if model.bf16 else "float32"
    server = engine.get_server_info().get("dtype")
    if server in (None, "auto", trainer):
        return []
    return [
        f"the engine {engine.url} computes in {server}, the trainer in {trainer}: weights are converted on loading"
    ]


def _config(directory: Path) -> dict[str, Any] | None:
    try:
        return read_object(directory / "config.json")
    except UserError:
        return None
