"""Stands for a W&B server: answers what the real `wandb.Api` asks for one run. The older half of its history is a
Parquet file, the newer half comes as rows, as on a real server."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

STEPS, EXPORTED = 6, 3
RUN = {
    "id": "UnVuOjE=", "projectId": "1", "name": "abc", "displayName": "nice", "state": "finished", "tags": [],
    "config": json.dumps({"lr": {"value": 0.1}, "nested": {"value": {"a": 1}}, "_wandb": {"value": {}}}),
    "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "historyLineCount": STEPS,
    "user": {"name": "me", "username": "me"}, "historyKeys": {"lastStep": STEPS - 1, "keys": {}}, "readOnly": False,
    "systemMetrics": "{}", "summaryMetrics": "{}", "sweepName": None, "group": None, "jobType": None, "commit": None,
    "description": None, "notes": None,
}  # fmt: skip
VIEWER = {"id": "1", "username": "me", "entity": "team", "email": None, "flags": "{}", "teams": {"edges": []}}


def history_row(step: int) -> dict[str, Any]:
    """What was logged at a step: an evaluation only at the last one."""
    row = {"_step": step, "_timestamp": 1e9 + step, "step": step, "train/loss": step / 4}
    return {**row, "eval/sums": 1.0} if step == STEPS - 1 else row


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/graphql":
            asked = json.loads(body)
            self._send(
                json.dumps({"data": self._answer(asked["query"], asked.get("variables") or {})}).encode()
            )
        else:  # telemetry
            self._send(b"")

    def do_GET(self) -> None:
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([history_row(step) for step in range(EXPORTED)]), file)
        self._send(file.getvalue())

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "viewer" in query:
            return {"viewer": VIEWER}
        if (variables["entity"], variables["project"]) != ("team", "project"):
            return {"project": None}
        if "parquetHistory" in query:
            url = f"http://{self.headers['Host']}/history.parquet"
            return {
                "project": {
                    "run": {"parquetHistory": {"parquetUrls": [url], "liveData": [history_row(STEPS - 1)]}}
                }
            }
        if "history(" in query:
            wanted = range(max(EXPORTED, variables["minStep"]), min(STEPS, variables["maxStep"]))
            return {"project": {"run": {"history": [json.dumps(history_row(step)) for step in wanted]}}}
        return {"project": {"run": RUN if variables["name"] == "abc" else None}}

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def fake_wandb_server() -> Iterator[str]:
    """Its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
