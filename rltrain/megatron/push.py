"""One push of the trainer's weights into the engines. All trainer ranks take part; rank 0 talks to the engines.

    WeightPush.push
      choose    the transport, once, when it is known where the engines are    weights/transports/choose.py
      send      every rank its share, or files; see `Sender`
        begin     the engines are paused, and a channel to each is opened      weights/session.py, channel.py
        send      bucket after bucket, in rounds of all ranks                  weights/rounds.py, transports/
                  (inside SGLang they are received, checked and loaded         weights/receive.py)
        confirm   every engine has reported every bucket as loaded             weights/session.py
        end       the engines go on with the new version
      confirm   by the checksums of all tensors, if asked for                  weights/checksums.py
      drop      the engines that failed twice

`--update-weight-transport` and `--update-weight-mode` say what is sent, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rltrain.arguments.config import Config
from rltrain.arguments.fleet import engines_load_alone
from rltrain.arguments.groups.checkpoint import starts_elsewhere
from rltrain.megatron.ranks import TrainerRanks, on_rank_0
from rltrain.run.role import RoleContext
from rltrain.weights.buckets import NamedTensor, Part
from rltrain.weights.checksums import Checksums, randomize_weights, wrong_tensors
from rltrain.weights.delta import DeltaState
from rltrain.weights.engine import Engine
from rltrain.weights.rounds import Rounds
from rltrain.weights.transports.choose import bucket_bytes, choose, make_transport
from rltrain.weights.transports.disk import BucketFiles, ModelDirectories

_TRIES = 2  # for an engine that can't take the weights

FindEngines = Callable[[], Sequence[Engine]]


class Weights(Protocol):
    """What is needed of `rltrain.megatron.exporter.Exporter`; all ranks call its methods together."""

    def stream(self, consume: Callable[[Iterable[NamedTensor]], object]) -> None:
        """Have rank 0 consume them."""

    def share(
        self, bucket_bytes: int, *, one_per_machine: bool, cut: bool = False
    ) -> Iterator[Sequence[Part]]:
        """This rank's share, in rounds that all ranks go through; with `cut` ranks may share a tensor."""

    def write(self, directory: Path) -> None:
        """Write a Hugging Face directory."""


class WeightPush:
    """Pushes weights by the transport that the flags name. All ranks call the methods together."""

    def __init__(
        self, config: Config, context: RoleContext, weights: Weights, event: Callable[..., None]
    ) -> None:
        """`event` records an event."""
        self._config, self._context, self._weights, self._event = config, context, weights, event
        self._sender: Sender | None = None  # depends on where the engines are
        self._is_unconfirmed = config.weights.check_weight_update_equal
        self._versions: dict[str, int] = {}  # that engines have got, by URL; on rank 0
        self._failures: dict[Engine, str] = {}  # why engines have not got theirs; on rank 0

    def push(self, find_engines: FindEngines, version: int) -> None:
        """Have every engine that lacks them load the present weights; the first time confirm that, if asked for.

        An engine that can't, or has other weights after a second try, is dropped: it is ended, and its role starts
        another one.

        Raises:
            RuntimeError: all engines failed; names them and the tensors.
        """
        if self._is_unconfirmed:
            self._is_unconfirmed = False
            self._send_and_confirm(find_engines, version)
        else:
            self._send(find_engines, version)

    def is_lacked(self, find_engines: FindEngines) -> bool:
        """Whether some engine did not get the last push and does not load it by itself; for rank 0."""
        if not self._versions or engines_load_alone(self._config.weights):
            return False
        return any(engine.url not in self._versions for engine in find_engines())

    def _send(self, find_engines: FindEngines, version: int) -> None:
        for _ in range(_TRIES):
            self._send_once(find_engines, version)
            if not on_rank_0(lambda: bool(self._failures)):
                return
        on_rank_0(self._drop_failed)

    def _send_once(self, find_engines: FindEngines, version: int) -> None:
        """Send the weights to the engines that have another version."""
        engines: list[Engine] = []

        def find_lacking() -> list[Engine]:
            engines[:] = [each for each in find_engines() if self._versions.get(each.url) != version]
            return engines

        if self._sender is None:
            transport = on_rank_0(lambda: choose(self._config, [engine.is_here for engine in find_engines()]))
            self._sender = make_sender(transport, self._config, self._context)
        failures = self._sender.send(version, self._weights, find_lacking)
        self._versions = {url: got for url, got in self._versions.items() if got == version}
        self._versions |= {each.url: version for each in engines if each.url not in failures}
        self._failures = {engine: failures[engine.url] for engine in engines if engine.url in failures}

    def _send_and_confirm(self, find_engines: FindEngines, version: int) -> None:
        """Send the weights to engines that have random ones, and compare the checksums of all tensors."""
        if (
            self._config.model.random_init or starts_elsewhere(self._config.checkpoint) or version > 0
        ):  # engines have other weights than the trainer
            self._send(find_engines, version)
        expected = on_rank_0(lambda: randomize_weights(find_engines()))
        for _ in range(_TRIES):
            self._versions.clear()
            if self._sender is not None:
                self._sender.forget()
            self._send(find_engines, version)
            on_rank_0(lambda: self._confirm(find_engines(), expected))
            if not on_rank_0(lambda: bool(self._failures)):
                self._event("weights_proven", version=version)
                return
        on_rank_0(self._drop_failed)

    def _confirm(self, engines: Sequence[Engine], expected: Checksums) -> None:
        """Find the engines whose tensors are not the expected ones."""
        wrong = wrong_tensors(engines, expected)
        self._versions = {url: got for url, got in self._versions.items() if url not in wrong}
        self._failures = {engine: wrong[engine.url] for engine in engines if engine.url in wrong}

    def _drop_failed(self) -> None:
        """End the engines that have failed."""
        reasons = "; ".join(self._failures.values())
        if not self._versions and not any(engine.has_died() for engine in self._failures):
            raise RuntimeError(f"no engine could take the weights: {reasons}")
        for engine, reason in self._failures.items():
            engine.expel(reason)
            self._event("weights_not_taken", url=engine.url, reason=reason)


class Sender(Protocol):
    """Sends the weights of one push; all ranks call the methods together."""

    def send(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """Have every engine load the weights and report their version; running requests go on with them.

        Only rank 0 asks for the engines.

        Returns:
            By URL, what went wrong with the engines that failed; for rank 0. They may have some of the new weights,
            and stay paused.
        """

    def forget(self) -> None:
        """Engines no longer have what they were sent."""


def make_sender(transport: str, config: Config, context: RoleContext) -> Sender:
    """The sender for a transport, and for `--update-weight-mode`."""
    if transport != "disk":
        return ShareSender(transport, config, context)
    root, host = context.layout.weights, context.host
    if config.weights.update_weight_mode == "delta":
        return ChangedFilesSender(BucketFiles(root, config.weights.update_weight_buffer_size, host))
    return DirectorySender(ModelDirectories(root, host))


class ShareSender:
    """Every rank sends its share: of all weights, or with `delta` of those that have changed."""

    def __init__(self, transport: str, config: Config, context: RoleContext) -> None:
        """By the transport of this name."""
        self._ranks, host = TrainerRanks(), context.host
        medium = make_transport(transport, config.engines, config.parallel, host, self._ranks.rank)
        self._rounds = Rounds(medium, self._ranks, host)
        self._bucket_bytes = bucket_bytes(transport, config)
        # Each rank that sends over the network needs one more process group with each engine.
        self._one_per_machine = medium.sends
        self._delta = DeltaState() if config.weights.update_weight_mode == "delta" else None

    def send(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Sender.send`."""
        engines = find_engines() if self._ranks.rank == 0 else []
        if not self._ranks.broadcast(len(engines)):
            return {}
        if self._delta is None:
            # Engines that read memory in place would have to copy what they put together.
            share = weights.share(
                self._bucket_bytes, one_per_machine=self._one_per_machine, cut=self._one_per_machine
            )
            return self._rounds.send(version, engines, share)
        rounds = weights.share(self._bucket_bytes, one_per_machine=self._one_per_machine)
        delta = self._delta
        everything = self._ranks.broadcast(delta.begin(version, engines))
        keep = self._ranks.broadcast(delta.keep) if everything else None
        named = ([(part.name, part.data) for part in whole] for whole in rounds)
        parts = (list(delta.parts(each, everything)) for each in named)
        failures = self._rounds.send(version, engines, parts, keep)
        delta.end(version, engines, failures)
        return failures

    def forget(self) -> None:
        """See `Sender.forget`."""
        if self._delta is not None:
            self._delta.forget()


class DirectorySender:
    """Every version is a Hugging Face directory, and every rank writes its share of it."""

    def __init__(self, directories: ModelDirectories) -> None:
        self._directories = directories

    def send(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Sender.send`."""
        weights.write(Path(on_rank_0(lambda: str(self._directories.make_room(version)))))
        failures: dict[str, str] = {}
        on_rank_0(lambda: failures.update(self._directories.send(version, find_engines)))
        return failures

    def forget(self) -> None:
        """Nothing: engines are sent everything anyway."""


class ChangedFilesSender:
    """Rank 0 writes what has changed since the push before, or all weights if an engine did not get that push."""

    def __init__(self, files: BucketFiles) -> None:
        self._files, self._delta = files, DeltaState()

    def send(self, version: int, weights: Weights, find_engines: FindEngines) -> dict[str, str]:
        """See `Sender.send`."""
        failures: dict[str, str] = {}
        weights.stream(lambda tensors: failures.update(self._send(version, tensors, find_engines())))
        return failures

    def forget(self) -> None:
        """See `Sender.forget`."""
        self._delta.forget()

    def _send(
        self, version: int, tensors: Iterable[NamedTensor], engines: Sequence[Engine]
    ) -> dict[str, str]:
        everything = self._delta.begin(version, engines)
        keep = self._delta.keep if everything else None
        parts = self._delta.parts(tensors, everything)
        failures = self._files.send(version, engines, parts, keep)
        self._delta.end(version, engines, failures)
        return failures
