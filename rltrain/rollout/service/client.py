"""The trainer's view of the rollout process: ask for a batch, an evaluation, a restart point."""

from __future__ import annotations

import json

import pyarrow as pa

from rltrain.run.http import HttpError, call_raw
from rltrain.schema import read_metrics

# A rollout of long responses takes hours: the supervisor, and not this timeout, notices a dead role.
_TIMEOUT_SECONDS = 24 * 3600.0


class RolloutError(RuntimeError):
    """The rollout process answered with an error; the message is its own."""


class RolloutClient:
    """HTTP client of `rltrain.rollout.service.server`."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token

    def load(self, rollout_id: int) -> None:
        """Put the data source where it stood before rollout `rollout_id`."""
        self._post("/load", rollout_id)

    def generate(self, rollout_id: int) -> tuple[pa.Table, dict[str, float]]:
        """The batch of one rollout (`rltrain.schema.TRAIN_COLUMNS`) and its metrics."""
        table = pa.ipc.open_stream(self._post("/generate", rollout_id)).read_all()
        return table, read_metrics(table.schema)

    def weights(self, version: int) -> None:
        """Tell that the engines now have the weights that were trained on `version` rollouts."""
        self._post("/weights", version)

    def eval(self, rollout_id: int) -> dict[str, float]:
        """Evaluate the weights that the engines hold; metrics named `eval/…`."""
        return json.loads(self._post("/eval", rollout_id))

    def _post(self, path: str, rollout_id: int) -> bytes:
        body = {"rollout_id": rollout_id}
        try:
            return call_raw("POST", self._url + path, self._token, body, _TIMEOUT_SECONDS)
        except HttpError as error:
            try:
                message = json.loads(error.body)["error"]
            except (ValueError, KeyError, TypeError):
                message = error.body or str(error)
            raise RolloutError(f"rollout {rollout_id}, {path}: {message}") from None
