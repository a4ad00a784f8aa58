"""The server of the live page: on loopback, for anyone who knows its token; it reads run directories only."""

from __future__ import annotations

import gzip
import hmac
import json
import re
import secrets
import threading
import warnings
from collections import OrderedDict
from http import HTTPStatus
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from analysis.live import series
from analysis.live.board import run_rows
from analysis.live.samples import SampleBlocks
from analysis.pages.html import fill
from analysis.reading.errors import DamagedFileWarning, NotInRunError, RunNotFoundError
from analysis.reading.source import find_runs
from analysis.run import Run, load_run
from rltrain.run.layout import RunLayout

HOST = "127.0.0.1"
_KEPT_RUNS = 8  # whose frames are in memory
_KEPT_PAGES = 3  # pages of samples that are open still, as the run was then
_MOST_EVENTS = 500
_MIN_GZIP = 1024  # bytes
_NAMES = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?")  # a page of another name is not ours (DNS rebinding)
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)


class Live:
    """Runs of a directory as they are now. What was read of a run is kept until its files change."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._runs: OrderedDict[str, tuple[Any, Run, SampleBlocks]] = OrderedDict()
        self._pages: OrderedDict[tuple[str, str], SampleBlocks] = OrderedDict()
        self._lock = threading.Lock()

    def board(self) -> dict[str, Any]:
        """All runs, a row each."""
        return {"directory": str(self.runs_dir), "runs": run_rows(self._paths().values())}

    def lines(self, names: list[str], metrics: list[str], axis: str) -> dict[str, Any]:
        """Metrics of some runs along an axis; a run that has no such axis is named in `problems`."""
        if axis not in series.AXES:
            raise KeyError(axis)
        runs = {name: self.run(name)[0] for name in names}
        found: dict[str, Any] = {}
        problems = []
        for name, run in runs.items():
            try:
                found[name] = series.lines(run, metrics, axis)
            except ValueError as error:
                problems.append(str(error))
        marks = {name: series.restarts(run) for name, run in runs.items()}
        metric_names = series.metric_names(list(runs.values()))
        return {"metrics": metric_names, "lines": found, "restarts": marks, "problems": problems}

    def events(self, name: str) -> list[dict[str, Any]]:
        """The last events of a run, the newest first."""
        frame = self.run(name)[0].events.iloc[: -_MOST_EVENTS - 1 : -1]
        return json.loads(frame.to_json(orient="records", date_format="iso"))

    def block(self, name: str, block: str, mark: str | None = None) -> Any:
        """A block of a run's page of samples, which begins with the block `meta`.

        Args:
            name: of the run.
            block: see `SampleBlocks.block`.
            mark: of the page, from its `meta`: the run may have got more samples since, and their order another.

        Raises:
            KeyError: there is no such run or block, or the page is too old.
        """
        blocks = self.run(name)[1]
        with self._lock:
            if block == "meta":
                self._pages[name, blocks.mark] = blocks
                while len(self._pages) > _KEPT_PAGES:
                    self._pages.popitem(last=False)
            elif mark is not None and mark != blocks.mark:
                if (name, mark) not in self._pages:
                    raise KeyError("this page is old: load it again")
                self._pages.move_to_end((name, mark))
                blocks = self._pages[name, mark]
        return blocks.block(block)

    def run(self, name: str) -> tuple[Run, SampleBlocks]:
        """A run and its samples, read again if its files have changed.

        Raises:
            KeyError: there is no run of this name.
        """
        path = self._paths()[name]
        sign = _sign_of(RunLayout(path))
        with self._lock:
            kept = self._runs.get(name)
            if kept is None or kept[0] != sign:
                run = load_run(path)
                kept = (sign, run, SampleBlocks(run))
                self._runs[name] = kept
            self._runs.move_to_end(name)
            while len(self._runs) > _KEPT_RUNS:
                self._runs.popitem(last=False)
        return kept[1], kept[2]

    def _paths(self) -> dict[str, Path]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedFileWarning)  # runs of others
            try:
                return {path.name: path for path in find_runs(self.runs_dir)}
            except RunNotFoundError:  # none yet
                return {}


def _sign_of(layout: RunLayout) -> tuple[Any, ...]:
    """Differs when there is something new to read."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    folders = (layout.rollouts, layout.rollouts / "eval")
    files = [layout.metrics, layout.events, *(each.events for _, each in layout.later_evaluations())]
    return (*((str(file), size(file)) for file in files), *(_changed(folder) for folder in folders))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


class LiveServer(ThreadingHTTPServer):
    """Serves `Live` on loopback.

    Args:
        runs_dir: directory of runs.
        port: 0 for any free one.
    """

    daemon_threads = True

    def __init__(self, runs_dir: Path, port: int = 0) -> None:
        self.live, self.token = Live(runs_dir), secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """The page, with the token that opens it."""
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Name of the cookie that holds the token: cookies of a host are sent to all of its ports."""
        return f"slurmlime-{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LiveServer
    _STATIC: ClassVar = {"live.js", "live.css"}

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if not _NAMES.fullmatch(self.headers.get("Host", "")):
            return self._refuse(HTTPStatus.FORBIDDEN, "This server answers to localhost only.")
        given = query.get("token", [""])[0]
        if url.path == "/" and given and self._is_token(given):
            return self._enter()
        if not self._is_token(self._cookie()):
            return self._refuse(
                HTTPStatus.UNAUTHORIZED,
                "Open the address that `python -m analysis.serve` has printed: it has the token of this page.",
            )
        try:
            self._answer(url.path, query)
        except (KeyError, NotInRunError, RunNotFoundError) as error:
            self._refuse(HTTPStatus.NOT_FOUND, f"Not found: {error}")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the browser has gone

    def _answer(self, path: str, query: dict[str, list[str]]) -> None:
        live, parts = self.server.live, [unquote(part) for part in path.split("/")[1:]]
        match parts:
            case [""]:
                self._send(_asset("live.html"), "text/html")
            case ["plotly.js"]:
                self._send(plotly_script(), "text/javascript", keep=True)
            case [name] if name in self._STATIC:
                self._send(_asset(name), _TYPES[Path(name).suffix])
            case ["api", "runs"]:
                self._send_json(live.board())
            case ["api", "lines"]:
                axis = query.get("axis", ["step"])[0]
                self._send_json(live.lines(query.get("run", []), query.get("metric", []), axis))
            case ["runs", name, "events"]:
                self._send_json(live.events(name))
            case ["runs", name, "samples"]:
                live.run(name)
                sources = "; connect-src 'self'"  # the page itself allows its script by its hash
                page = fill(name, sources=sources).encode()
                self._send(page, "text/html", policy="frame-ancestors 'self'")
            case ["runs", name, "blocks", block]:
                self._send_json(live.block(name, block, query.get("mark", [None])[0]))
            case _:
                raise KeyError(path)

    def _enter(self) -> None:
        """Keep the token in a cookie, so that it does not stay in the address and its history."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        cookie = f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
        self.send_header("Set-Cookie", cookie)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _cookie(self) -> str:
        jar = SimpleCookie(self.headers.get("Cookie", ""))
        return jar[self.server.cookie].value if self.server.cookie in jar else ""

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(why.encode(), "text/plain", status=status)

    def _send_json(self, value: Any) -> None:
        self._send(json.dumps(_finite(value), allow_nan=False).encode("ascii"), "application/json")

    def _send(
        self,
        body: bytes,
        kind: str,
        *,
        status: HTTPStatus = HTTPStatus.OK,
        policy: str = _POLICY,
        keep: bool = False,
    ) -> None:
        self.send_response(status)
        if len(body) >= _MIN_GZIP and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "private, max-age=86400" if keep else "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: a request's line may hold the token."""


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value


def plotly_script() -> bytes:
    """Plotly's script, which its Python package ships.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()


def _asset(name: str) -> bytes:
    return resources.files("analysis.live").joinpath("assets", name).read_bytes()
