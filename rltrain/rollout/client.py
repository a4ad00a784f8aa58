"""The trainer's view of the rollout process: ask for a batch, an evaluation, a restart point."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pyarrow as pa

from rltrain.schema import read_metrics

# A rollout of long responses takes hours: the supervisor, and not this timeout, notices a dead role.
_TIMEOUT_SECONDS = 24 * 3600.0


class RolloutError(RuntimeError):
    """The rollout process answered with an error; the message is its own."""


class RolloutClient:
    """HTTP client of `rltrain.rollout.server`."""

    def __init__(self, url: str, auth: dict[str, str]) -> None:
        self._url, self._auth = url, auth
        # Proxies of the site must not swallow traffic inside the job.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

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

    def _post(self, path: str, rollout_id: int) -> Any:
        request = urllib.request.Request(
            self._url + path,
            data=json.dumps({"rollout_id": rollout_id}).encode(),
            headers={"Content-Type": "application/json", **self._auth},
        )
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            try:
                message = json.loads(body)["error"]
            except (ValueError, KeyError, TypeError):
                message = body or str(error)
            raise RolloutError(f"rollout {rollout_id}, {path}: {message}") from None
