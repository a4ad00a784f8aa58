"""The trainer's side of a push: all ranks take part, rank 0 speaks to the engines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from rltrain.arguments.fleet import engines_load_alone
from rltrain.megatron.distributed import on_rank_0
from rltrain.runtime import RoleContext
from rltrain.weights.proof import difference, forget_weights
from rltrain.weights.transport import Engine, make_updates

Stream = Callable[[Callable[[Iterable[tuple[str, Tensor]]], object]], None]
FindEngines = Callable[[], Sequence[Engine]]


class WeightUpdates:
    """Pushes weights by the transport that the flags name. Methods are called by all ranks together."""

    def __init__(
        self, args: argparse.Namespace, context: RoleContext, stream: Stream, event: Callable[..., None]
    ) -> None:
        """`stream` gathers the weights, and has rank 0 consume them; `event` records one."""
        self._args, self._stream, self._event = args, stream, event
        self._updates = make_updates(args, context)
        self._to_be_proven = args.check_weight_update_equal
        self._held: dict[str, int] = {}  # version that an engine has got, by its URL

    def push(self, find_engines: FindEngines, version: int) -> None:
        """Have every engine that lacks them load the present weights; the first time with proof, if asked for.

        An engine that can't, or holds others after a second try, is ended, and its role starts another one.

        Raises:
            RuntimeError: all of them are so; names them and the tensors.
        """
        if self._to_be_proven:
            self._to_be_proven = False
            self._prove(find_engines, version)
        else:
            self._push(find_engines, version)

    def are_lacked(self, find_engines: FindEngines) -> bool:
        """Whether an engine is there that did not get the last push and does not load it alone; for rank 0."""
        if not self._held or engines_load_alone(self._args):
            return False
        return any(engine.url not in self._held for engine in find_engines())

    def _push(self, find_engines: FindEngines, version: int) -> None:
        self._stream(lambda tensors: self._hand_out(tensors, find_engines, version))

    def _hand_out(
        self, tensors: Iterable[tuple[str, Tensor]], find_engines: FindEngines, version: int
    ) -> None:
        engines: list[Engine] = []

        def find_lacking() -> list[Engine]:
            engines[:] = [each for each in find_engines() if self._held.get(each.url) != version]
            return engines

        failures = self._updates.push(version, tensors, find_lacking)
        self._held = {url: held for url, held in self._held.items() if held == version}
        self._held |= {each.url: version for each in engines if each.url not in failures}
        self._expel(engines, failures)

    def _expel(self, engines: Sequence[Engine], failures: Mapping[str, str]) -> None:
        failed = [engine for engine in engines if engine.url in failures]
        if failed and len(failed) == len(engines) and not any(engine.has_died() for engine in failed):
            raise RuntimeError(f"no engine could take the weights: {'; '.join(failures.values())}")
        for engine in failed:
            engine.expel(failures[engine.url])
            self._event("weights_not_taken", url=engine.url, reason=failures[engine.url])

    def _prove(self, find_engines: FindEngines, version: int) -> None:
        """Push over random weights, and see that all tensors come back."""
        if self._args.random_init or self._args.load or version > 0:  # engines have others than the trainer
            self._push(find_engines, version)
        expected = on_rank_0(lambda: forget_weights(find_engines()))
        for _ in range(2):
            self._held.clear()
            self._push(find_engines, version)
            wrong = on_rank_0(lambda: difference(find_engines(), expected))
            if not wrong:
                break
        self._held = {url: held for url, held in self._held.items() if url not in wrong}
        on_rank_0(lambda: self._expel(list(find_engines()), wrong))
        self._event("weights_proven", version=version)
