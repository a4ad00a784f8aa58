"""The trainer's side of a push: all ranks take part, rank 0 speaks to the engines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rltrain.arguments.fleet import engines_load_alone
from rltrain.megatron.distributed import on_rank_0
from rltrain.megatron.updates import FindEngines, Updates, Weights, make_updates
from rltrain.runtime import RoleContext
from rltrain.weights.proof import Checksums, difference, forget_weights
from rltrain.weights.transport import Engine, choose

_TRIES = 2  # of an engine that can't take the weights


class WeightUpdates:
    """Pushes weights by the transport that the flags name. Methods are called by all ranks together."""

    def __init__(
        self, args: argparse.Namespace, context: RoleContext, weights: Weights, event: Callable[..., None]
    ) -> None:
        """`event` records one."""
        self._args, self._context, self._weights, self._event = args, context, weights, event
        self._updates: Updates | None = None  # it depends on where the engines are
        self._to_be_proven = args.check_weight_update_equal
        self._held: dict[str, int] = {}  # version that an engine has got, by its URL; on rank 0
        self._failures: dict[Engine, str] = {}  # why it has not; on rank 0

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
        if self._updates is None:
            transport = on_rank_0(lambda: choose(self._args, [engine.is_here for engine in find_engines()]))
            self._updates = make_updates(transport, self._args, self._context)
        for _ in range(_TRIES):
            self._hand_out(self._updates, find_engines, version)
            if not on_rank_0(lambda: bool(self._failures)):
                return
        on_rank_0(self._expel)

    def _hand_out(self, updates: Updates, find_engines: FindEngines, version: int) -> None:
        engines: list[Engine] = []

        def find_lacking() -> list[Engine]:
            engines[:] = [each for each in find_engines() if self._held.get(each.url) != version]
            return engines

        failures = updates.push(version, self._weights, find_lacking)
        self._held = {url: held for url, held in self._held.items() if held == version}
        self._held |= {each.url: version for each in engines if each.url not in failures}
        self._failures = {engine: failures[engine.url] for engine in engines if engine.url in failures}

    def _expel(self) -> None:
        """End the engines that have failed."""
        reasons = "; ".join(self._failures.values())
        if not self._held and not any(engine.has_died() for engine in self._failures):
            raise RuntimeError(f"no engine could take the weights: {reasons}")
        for engine, reason in self._failures.items():
            engine.expel(reason)
            self._event("weights_not_taken", url=engine.url, reason=reason)

    def _prove(self, find_engines: FindEngines, version: int) -> None:
        """Push over random weights, and see that all tensors come back."""
        if self._args.random_init or self._args.load or version > 0:  # engines have others than the trainer
            self._push(find_engines, version)
        expected = on_rank_0(lambda: forget_weights(find_engines()))
        for _ in range(_TRIES):
            self._held.clear()
            if self._updates is not None:
                self._updates.forget()
            self._push(find_engines, version)
            on_rank_0(lambda: self._compare(find_engines(), expected))
            if not on_rank_0(lambda: bool(self._failures)):
                self._event("weights_proven", version=version)
                return
        on_rank_0(self._expel)

    def _compare(self, engines: Sequence[Engine], expected: Checksums) -> None:
        wrong = difference(engines, expected)
        self._held = {url: held for url, held in self._held.items() if url not in wrong}
        self._failures = {engine: wrong[engine.url] for engine in engines if engine.url in wrong}
