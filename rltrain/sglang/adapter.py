"""`HttpServerEngineAdapter`: one SGLang engine behind its HTTP interface.

Starts a real server as a child process, or speaks to one that runs elsewhere; registers it at the router;
and sends it what the router does not pass on: pause, abort, flush and weight updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from rltrain.run.http import HttpError, call, get_status, make_url
from rltrain.run.processes import reserve_port
from rltrain.sglang.health import HealthLimits, watch
from rltrain.sglang.process import READY_TIMEOUT, ServerProcess
from rltrain.sglang.routers import add_worker, remove_worker
from rltrain.weights import LOADER

BEGIN_PUSH, END_PUSH = "/slurmlime/begin_push", "/slurmlime/end_push"  # see `rltrain.sglang.push_routes`

_UPDATE_TIMEOUT = 1800.0  # seconds; large models load slowly from a busy filesystem
# In the names of tensors that the trainer does not have, and engines keep as they loaded them: of indexers
# (DeepSeek-V3.2, GLM-5), which choose among more tokens than are trained on.
_NOT_PUSHED = (".self_attn.indexer.",)


class HttpServerEngineAdapter:
    """One engine. Methods block and raise `HttpError`, with the engine's own words, when it refuses."""

    is_ours = True  # started by us, so that it has our loader

    def __init__(self, url: str, token: str, process: ServerProcess | None = None) -> None:
        """Speak to the engine at `url`; `process` is given when it is our own child."""
        self.url = url.rstrip("/")
        self._token = token
        self._process = process
        self._tp_size: int | None = None

    @classmethod
    def launch(
        cls,
        server_args: dict[str, Any],
        token: str,
        *,
        host: str = "127.0.0.1",
        timeout: float = READY_TIMEOUT,
    ) -> Self:
        """Start a server on a free port of `host` and wait until it is ready.

        Args:
            server_args: keyword arguments of SGLang's `ServerArgs`, without address and key.
            token: the key that every request must carry.

        Raises:
            ServerDiedError: the server ended while it started; its output says why.
            TimeoutError: it was not ready within `timeout` seconds.
        """
        with reserve_port(host) as reserved:
            port = reserved.getsockname()[1]
            settings = {
                "log_level_http": "warning",
                "enable_metrics": True,  # its answers then say how long they queued and were prefilled
                **server_args,
                "custom_weight_loader": [
                    *(server_args.get("custom_weight_loader") or []),
                    LOADER,
                ],
                "host": host,
                "port": port,
                "api_key": token,
            }
            process = ServerProcess("rltrain.sglang.server", settings, make_url(host, port))
            try:
                process.wait_until_ready(timeout=timeout)
            except BaseException:
                process.stop()
                raise
        return cls(process.url, token, process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    @property
    def pid(self) -> int:
        """Process id of a server of our own."""
        assert self._process is not None, "the server is not a child of this process"
        return self._process.pid

    def wait(self) -> NoReturn:
        """Wait for a server of our own to end, which it should not do by itself.

        Raises:
            ServerDiedError: always, when it has ended.
        """
        assert self._process is not None, "the server is not a child of this process"
        self._process.wait()

    def watch(
        self, limits: HealthLimits, is_loading: Callable[[], bool], tick: Callable[[], object]
    ) -> NoReturn:
        """Watch over a server of our own until it ends or hangs; see `rltrain.sglang.health.watch`.

        Raises:
            ServerDiedError: it has ended.
            HungError: it makes no progress.
        """
        process = self._process
        assert process is not None, "the server is not a child of this process"
        watch(process.pid, self.makes_progress, is_loading, limits, process.has_ended, tick)
        process.wait()

    def shutdown(self) -> None:
        """End the server if it is our own child; else do nothing."""
        if self._process is not None:
            self._process.stop()

    def register(
        self, router_url: str, timeout: float = 120.0, router_token: str | None = None, **role: Any
    ) -> None:
        """Join the router, and wait until it sends requests here.

        `router_token` where it asks for another one than we do; `role` is `worker_type` and `bootstrap_port` of an
        engine that computes only prompts or only responses.
        """
        worker = {"url": self.url, "api_key": self._token, **role}
        add_worker(router_url, router_token or self._token, worker, timeout)

    def unregister(self, router_url: str, timeout: float = 60.0, router_token: str | None = None) -> None:
        """Leave the router, and wait until it has forgotten us."""
        remove_worker(router_url, router_token or self._token, self.url, timeout)

    def health(self, timeout: float = 5.0) -> bool:
        """Whether the server answers; never raises."""
        try:
            return get_status(f"{self.url}/health", timeout) == 200
        except OSError:
            return False

    def makes_progress(self, timeout: float = 5.0) -> bool:
        """Whether the scheduler answers, which does the work and which `health` does not ask; never raises."""
        try:
            self.get_server_info(timeout)
        except (OSError, HttpError):
            return False
        return True

    def get_server_info(self, timeout: float = 60.0) -> dict[str, Any]:
        """The arguments that the server runs with, and the state of its scheduler."""
        return self._call("GET", "/server_info", timeout=timeout)

    def get_model_info(self) -> dict[str, Any]:
        """The server's own description: model path, architecture, weight version, …"""
        return self._call("GET", "/model_info")

    def get_weight_version(self) -> str:
        """Version of the weights in use: what the last update named, `default` before any."""
        return str(self.get_model_info()["weight_version"])

    def flush_cache(self, timeout: float = 60.0) -> None:
        """Forget all cached prefixes; waits up to `timeout` seconds for running requests to end."""
        self._call("POST", f"/flush_cache?timeout={timeout}", timeout=timeout + 10)

    def pause_generation(self, mode: Literal["abort", "in_place", "retract"] = "retract") -> None:
        """Stop generating: `abort` ends running requests with what they have; the others keep them.

        Weights can be changed while requests are kept by `retract` (they are prefilled again afterwards).
        """
        self._call("POST", "/pause_generation", {"mode": mode})

    def continue_generation(self) -> None:
        """Go on after `pause_generation`."""
        self._call("POST", "/continue_generation", {})

    def release_memory(self, tag: str) -> None:
        """Give the GPU memory of `weights` or `kv_cache` back, and lose what is in it; the engine must be idle."""
        self._call("POST", "/release_memory_occupation", {"tags": [tag]}, _UPDATE_TIMEOUT)

    def resume_memory(self, tag: str) -> None:
        """Take that memory again; weights have to be sent again."""
        self._call("POST", "/resume_memory_occupation", {"tags": [tag]}, _UPDATE_TIMEOUT)

    def abort(self, request_id: str | None = None) -> None:
        """End one request, or all, with the tokens it has (finish reason `abort`)."""
        self._call("POST", "/abort_request", {"rid": request_id or "", "abort_all": request_id is None})

    def update_weights_from_disk(
        self, path: Path | str, weight_version: str | None = None, *, timeout: float = _UPDATE_TIMEOUT
    ) -> None:
        """Load the Hugging Face weights in `path`, flush the cache, and name the result `weight_version`.

        The engine must be idle or paused with `retract`.
        """
        # An engine that was started without weights would else try to load these in the same way.
        body = {"model_path": str(path), "weight_version": weight_version, "load_format": "auto"}
        self._call("POST", "/update_weights_from_disk", body, timeout)

    def begin_push(self, payloads: Sequence[str], load_format: str) -> None:
        """Pause with requests retracted, and load the first payloads of an update, see `update_weights_from_tensor`."""
        self._call("POST", BEGIN_PUSH, self._update_body(payloads, load_format), _UPDATE_TIMEOUT)

    def end_push(self, weight_version: str) -> None:
        """Put what was loaded into use, name it `weight_version`, and go on."""
        body = {"new_version": weight_version, "abort_all_requests": False}
        self._call("POST", END_PUSH, body, _UPDATE_TIMEOUT)

    def end_weight_update(self) -> None:
        """End an update, and stay paused."""
        self._call("POST", "/end_weight_update", {}, _UPDATE_TIMEOUT)

    def update_weights_from_tensor(self, payloads: Sequence[str], load_format: str) -> None:
        """Load more of an update that `begin_push` has begun: what the payloads hold, one for every rank of the engine.

        Args:
            payloads: Pairs of a name and a tensor, pickled, in base64.
            load_format: A loader that the engine was started with, as an import path.
        """
        self._call(
            "POST", "/update_weights_from_tensor", self._update_body(payloads, load_format), _UPDATE_TIMEOUT
        )

    def weight_checksums(self) -> dict[str, str]:
        """A checksum of each of its tensors that a push brings, by rank and name; the engine is idle."""
        ranks = self._call("POST", "/weights_checker", _check_body("checksum"), _UPDATE_TIMEOUT)["ranks"]
        return {
            f"{name} (rank {i})" if len(ranks) > 1 else name: checksum
            for i, rank in enumerate(ranks)
            for name, checksum in rank["checksums"].items()
        }

    def randomize_weights(self) -> None:
        """Put random numbers in place of all weights that a push brings; the engine is idle."""
        self._call("POST", "/weights_checker", _check_body("reset_tensors"), _UPDATE_TIMEOUT)

    def tensor_parallel_size(self) -> int:
        """Number of its ranks."""
        if self._tp_size is None:
            self._tp_size = int(self._call("GET", "/server_info")["tp_size"])
        return self._tp_size

    def _call(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> Any:
        return call(method, self.url + path, self._token, body, timeout)

    def _update_body(self, payloads: Sequence[str], load_format: str) -> dict[str, Any]:
        return {
            "serialized_named_tensors": list(payloads),
            "load_format": load_format,
            "flush_cache": True,  # of each part of a push: nothing is computed before its end
            "selector": "target",  # a model that drafts keeps its own: the trainer's listener is there for one
        }


def _check_body(action: str) -> dict[str, Any]:
    return {"action": action, "selector": "target", "skip_tensor_list": list(_NOT_PUSHED)}
