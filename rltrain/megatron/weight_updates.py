"""The trainer's side of a push: all ranks take part, rank 0 speaks to the engines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from rltrain.megatron.distributed import on_rank_0
from rltrain.runtime import RoleContext
from rltrain.weights.proof import difference, forget_weights
from rltrain.weights.transport import Engine, make_transport

Stream = Callable[[Callable[[Iterable[tuple[str, Tensor]]], object]], None]
FindEngines = Callable[[], Sequence[Engine]]


class WeightUpdates:
    """Pushes weights by the transport that the flags name. Methods are called by all ranks together."""

    def __init__(
        self, args: argparse.Namespace, context: RoleContext, stream: Stream, event: Callable[..., None]
    ) -> None:
        """`stream` gathers the weights, and has rank 0 consume them; `event` records one."""
        self._args, self._stream, self._event = args, stream, event
        self._transport = make_transport(args, context)
        self._to_be_proven = args.check_weight_update_equal

    def push(self, find_engines: FindEngines, version: int) -> None:
        """Have every engine load the present weights; the first time with proof, if asked for.

        Raises:
            RuntimeError: an engine could not, or holds others after a second try; names it and the tensors.
        """
        if self._to_be_proven:
            self._to_be_proven = False
            self._prove(find_engines, version)
        else:
            self._push(find_engines, version)

    def _push(self, find_engines: FindEngines, version: int) -> None:
        self._stream(lambda tensors: self._transport.push(version, tensors, find_engines))

    def _prove(self, find_engines: FindEngines, version: int) -> None:
        """Push over random weights, and see that all tensors come back."""
        if self._args.random_init or self._args.load or version > 0:  # engines have others than the trainer
            self._push(find_engines, version)
        expected = on_rank_0(lambda: forget_weights(find_engines()))
        self._push(find_engines, version)
        if on_rank_0(lambda: difference(find_engines(), expected)) is not None:
            self._push(find_engines, version)
            if problem := on_rank_0(lambda: difference(find_engines(), expected)):
                raise RuntimeError(
                    f"--check-weight-update-equal: the engines lack weights of the trainer: {problem}"
                )
        self._event("weights_proven", version=version)
