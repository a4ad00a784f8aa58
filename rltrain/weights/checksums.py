"""Confirms that a push gives engines all weights: `--check-weight-update-equal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rltrain.weights.engine import ServerEngine
from rltrain.weights.session import for_all

Checksums = dict[str, dict[str, str]]  # of each tensor, by the engine's URL

_MOST_NAMED = 5


def randomize_weights(engines: Sequence[ServerEngine]) -> Checksums:
    """Put random weights into idle engines; returns the checksums of the weights that they had."""
    checksums: Checksums = {}
    for_all(engines, lambda engine: checksums.update({engine.url: engine.weight_checksums()}))
    for_all(engines, lambda engine: engine.randomize_weights())
    return checksums


def wrong_tensors(
    engines: Sequence[ServerEngine], expected: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """By URL, which tensors of an engine have unexpected checksums; engines without differences are omitted."""
    problems = {}
    for engine in engines:
        found, wanted = engine.weight_checksums(), expected.get(engine.url, {})
        names = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        if names:
            shown = ", ".join(sorted(names)[:_MOST_NAMED])
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            problems[engine.url] = (
                f"--check-weight-update-equal: {engine.url} lacks weights of the trainer: {shown}{more}"
            )
    return problems
