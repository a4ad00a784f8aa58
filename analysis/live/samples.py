"""The samples of a run for its page: the blocks of a report (`analysis.pages`), made when they are asked for."""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.frames.run import RunFrames
from analysis.pages import data

_MOST = 10_000  # samples of a page; whole groups, evenly from the whole run


class SampleBlocks:
    """The blocks of one run as it is now; `mark` tells them from those of another moment."""

    def __init__(self, run: RunFrames) -> None:
        self._run, self.mark = run, secrets.token_hex(4)

    @cached_property
    def _all(self) -> pd.DataFrame:
        frames = [frame for frame in (self._run.samples, self._run.evals) if len(frame)]
        return pd.concat(frames or [self._run.samples]).reset_index(drop=True)

    @cached_property
    def _chosen(self) -> pd.DataFrame:
        return data.choose(self._all, _MOST).reset_index(drop=True)

    def block(self, name: str) -> Any:
        """A block by its name in the report: `meta`, `index`, `notes`, `vocabulary`, `texts-3`, `tokens-3`.

        Raises:
            KeyError: there is none of this name.
        """
        if name == "meta":
            meta = data.meta_of(self._run, len(self._chosen), len(self._all), overview=True)
            return meta | {"mark": self.mark, "charts": []}  # they have a view of their own
        if name == "index":
            return self._index()
        if name == "notes":
            return data.notes_of(self._run, self._in_order)
        if name == "vocabulary":
            return self._vocabulary()
        kind, _, number = name.partition("-")
        if kind not in ("texts", "tokens") or not number.isdigit():
            raise KeyError(name)
        return self._part(kind, int(number))

    def _index(self) -> dict[str, list[Any]]:
        index: dict[str, list[Any]] = data.index_of(self._chosen.iloc[:0].assign(response=None))
        for part in data.parts(self._chosen):
            for key, values in data.index_of(data.read_part(self._run, part, ["response"])).items():
                index[key].extend(values)
        return index

    def _vocabulary(self) -> dict[str, str]:
        vocabulary = self._run.vocabulary
        return {} if vocabulary is None else data.vocabulary_of(vocabulary.ids, vocabulary)

    def _part(self, kind: str, number: int) -> list[Any]:
        rows = self._in_order.iloc[number * data.BLOCK : (number + 1) * data.BLOCK]
        if rows.empty:
            raise KeyError(f"{kind}-{number}")
        columns = data.TOKEN_COLUMNS if kind == "tokens" else data.TEXT_COLUMNS
        found = []
        for part in data.parts(rows):
            records: list[dict[str, Any]] = data.read_part(self._run, part, columns).to_dict("records")  # type: ignore[assignment]
            for row in records:
                found.append(
                    data.tokens_of(row) if kind == "tokens" else data.texts_of(row, self._run.vocabulary)
                )
        return found

    @cached_property
    def _in_order(self) -> pd.DataFrame:
        """The rows in the order of the index."""
        parts = data.parts(self._chosen)
        return pd.concat(parts) if parts else self._chosen
