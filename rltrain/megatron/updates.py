"""What a push sends, and how: shares of all ranks, a directory that they write, or what has changed.

See `--update-weight-transport` and `--update-weight-mode`.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rltrain.megatron.agreement import TrainerRanks
from rltrain.megatron.distributed import on_rank_0
from rltrain.runtime import RoleContext
from rltrain.weights.buckets import NamedTensor, Part
from rltrain.weights.delta import Sent
from rltrain.weights.disk import Directories, DiskTransport
from rltrain.weights.sharing import Sharing
from rltrain.weights.transport import Engine, bucket_bytes, make_medium

FindEngines = Callable[[], Sequence[Engine]]


class Weights(Protocol):
    """What is needed of `rltrain.megatron.exporter.Exporter`; all ranks call its methods together."""

    def stream(self, consume: Callable[[Iterable[NamedTensor]], object]) -> None:
        """Have rank 0 consume them."""

    def share(self, bucket_bytes: int, *, one_per_machine: bool) -> Iterator[Sequence[NamedTensor]]:
        """This rank's share, in rounds that all ranks go through."""

    def write(self, directory: Path) -> None:
        """Write a Hugging Face directory."""


class Updates(Protocol):
    """What a push sends, and how; all ranks take part."""

    def push(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """Have every engine load the weights and report their version; requests that run go on with them.

        Only rank 0 asks for the engines.

        Returns:
            By URL, what went wrong with the engines that failed; for rank 0. They may have some of the new weights,
            and stay paused.
        """

    def forget(self) -> None:
        """Engines no longer hold what they were sent."""


class SharedUpdates:
    """Every rank hands out its share of all weights, or with `delta` of those that have changed."""

    def __init__(self, transport: str, args: argparse.Namespace, context: RoleContext) -> None:
        """By the transport of this name."""
        self._ranks = TrainerRanks()
        medium = make_medium(transport, args, context, self._ranks.number)
        self._sharing: Sharing[Engine] = Sharing(medium, self._ranks, context.host)
        self._bucket_bytes = bucket_bytes(transport, args)
        # Each rank that sends over the network is one more group for each engine.
        self._one_per_machine = medium.sends
        self._changes = Changes() if args.update_weight_mode == "delta" else None

    def push(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Updates.push`."""
        engines = find_engines() if self._ranks.number == 0 else []
        if not self._ranks.tell(len(engines)):
            return {}
        rounds = weights.share(self._bucket_bytes, one_per_machine=self._one_per_machine)
        if self._changes is None:
            parts = ([Part.whole(name, tensor) for name, tensor in named] for named in rounds)
            return self._sharing.push(version, engines, parts)
        everything = self._ranks.tell(self._changes.begin(version, engines))
        changes, keep = self._changes, self._ranks.tell(self._changes.keep) if everything else None
        parts = (list(changes.parts(named, everything)) for named in rounds)
        failures = self._sharing.push(version, engines, parts, keep)
        changes.end(version, engines, failures)
        return failures

    def forget(self) -> None:
        """See `Updates.forget`."""
        if self._changes is not None:
            self._changes.forget()


class WrittenUpdates:
    """Every push is a Hugging Face directory, of which every rank writes its share."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def push(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Updates.push`."""
        weights.write(Path(on_rank_0(lambda: str(self._directories.make_room(version)))))
        failures: dict[str, str] = {}
        on_rank_0(lambda: failures.update(self._directories.push(version, find_engines)))
        return failures

    def forget(self) -> None:
        """Nothing: they are sent everything anyway."""


class ChangedFiles:
    """Rank 0 writes what has changed since the push before, or all weights if an engine did not get that one."""

    def __init__(self, transport: DiskTransport) -> None:
        self._transport, self._changes = transport, Changes()

    def push(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Updates.push`."""
        failures: dict[str, str] = {}
        weights.stream(lambda tensors: failures.update(self._send(version, tensors, find_engines())))
        return failures

    def forget(self) -> None:
        """See `Updates.forget`."""
        self._changes.forget()

    def _send(
        self, version: int, tensors: Iterable[NamedTensor], engines: Sequence[Engine]
    ) -> dict[str, str]:
        everything = self._changes.begin(version, engines)
        keep = self._changes.keep if everything else None
        parts = self._changes.parts(tensors, everything)
        failures = self._transport.push(version, engines, parts, keep)
        self._changes.end(version, engines, failures)
        return failures


class Changes:
    """What this rank has sent, and which engines have it all.

    Attributes:
        keep: the name under which engines keep what they get.
    """

    def __init__(self) -> None:
        self.keep = f"slurmlime-weights-{uuid.uuid4().hex}"
        self._sent = Sent()
        self._version: int | None = None  # of what was sent last
        self._known: set[str] = set()  # URLs of engines that have it

    def begin(self, version: int, engines: Sequence[Engine]) -> bool:
        """Whether these engines need everything, as changes are not enough for one of them."""
        is_enough = all(engine.url in self._known for engine in engines)
        if version != self._version:
            self._known = set()  # a push that fails on its way leaves nobody with what it was meant to send
        elif not is_enough:
            self._known -= {engine.url for engine in engines}
        return not is_enough

    def forget(self) -> None:
        """No engine has it any more."""
        self._known.clear()

    def parts(self, tensors: Iterable[NamedTensor], everything: bool) -> Iterator[Part]:
        """What to send of these tensors."""
        return self._sent.whole(tensors) if everything else self._sent.changes(tensors)

    def end(self, version: int, engines: Sequence[Engine], failures: dict[str, str]) -> None:
        """These engines have got it, but for those that have failed."""
        self._version = version
        self._known = (self._known | {engine.url for engine in engines}) - failures.keys()


def make_updates(transport: str, args: argparse.Namespace, context: RoleContext) -> Updates:
    """Those that the flags name, by the transport of this name."""
    if transport != "disk":
        return SharedUpdates(transport, args, context)
    root, host = context.layout.weights, context.host
    if args.update_weight_mode == "delta":
        return ChangedFiles(DiskTransport(root, args.update_weight_buffer_size, host))
    return WrittenUpdates(Directories(root, host))
