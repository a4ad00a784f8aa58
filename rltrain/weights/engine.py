"""What a push needs of an engine. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ServerEngine(Protocol):
    """An engine behind its HTTP interface, see `rltrain.sglang.adapter.HttpServerEngineAdapter`.

    Attributes:
        is_ours: whether the job started it, so that it has our loader.
    """

    url: str
    is_ours: bool

    def tensor_parallel_size(self) -> int:
        """Number of its ranks."""

    def pause_generation(self) -> object:
        """Hold requests back; running ones keep their tokens, and nothing that the old weights computed."""

    def continue_generation(self) -> object:
        """Let requests go on."""

    def begin_push(self, payloads: Sequence[str], load_format: str) -> object:
        """Pause, as `pause_generation`, and do the first `update_weights_from_tensor`."""

    def update_weights_from_tensor(self, payloads: Sequence[str], load_format: str) -> object:
        """Give each rank its payload; returns when the loader has returned on all of them."""

    def end_push(self, weight_version: str) -> object:
        """Put the new weights into use, report this version from then on, and let requests go on."""

    def end_weight_update(self) -> object:
        """End it for an engine that has not got all weights: it stays paused."""

    def update_weights_from_disk(self, path: str, weight_version: str) -> object:
        """Load new weights, forget what the old ones computed, and report this version from then on."""

    def weight_checksums(self) -> dict[str, str]:
        """A checksum of each of its tensors."""

    def randomize_weights(self) -> object:
        """Put random numbers in place of all weights."""


class Engine(ServerEngine, Protocol):
    """An engine of the fleet as the trainer sees it, see `rltrain.sglang.engines`.

    Attributes:
        is_here: whether it runs on this machine.
    """

    is_here: bool

    def has_died(self) -> bool:
        """Whether it is gone for good."""

    def expel(self, reason: str) -> object:
        """Have it ended, because it did not get the weights."""
