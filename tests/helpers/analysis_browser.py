"""A real headless Chromium, spoken to over its DevTools protocol: opens a page, runs expressions, takes pictures."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", "about:blank",
]  # fmt: skip
_TIMEOUT = 60
_PATIENCE = 50


class Page:
    """One page; `errors` holds what the console and the page itself complained about."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._ids = loop, socket, itertools.count(1)
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str, width: int = 1440, height: int = 900) -> None:
        """Load `url` and wait until its own script says that it is ready."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url="about:blank")  # a change of the fragment alone would load nothing
        self.call("Page.navigate", url=url)
        self.wait("document.body && document.body.dataset.ready === 'yes'")

    def leave(self) -> None:
        """Show an empty page, so that no script of the last one asks for anything; its complaints are forgotten."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.errors.clear()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until `condition` holds; one that throws does not hold yet: a frame that loads has no body."""
        poll = f"""new Promise((resolve, reject) => {{
            const end = performance.now() + {_PATIENCE * 1000};
            const look = () => {{
                let failure = "it is false";
                try {{ if ({condition}) return resolve(true); }} catch (error) {{ failure = error; }}
                if (performance.now() > end) return reject(new Error({json.dumps(condition)} + ": " + failure));
                setTimeout(look, 15);
            }};
            look(); }})"""
        self.evaluate(poll)

    def type(self, element: str, text: str) -> None:
        """Put the cursor into an element and type."""
        self.evaluate(f"document.getElementById({element!r}).focus()")
        self.call("Input.insertText", text=text)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), _TIMEOUT))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        kind, content = message.get("method"), json.dumps(message.get("params"))
        is_log = kind == "Log.entryAdded" and message["params"]["entry"]["level"] in ("error", "warning")
        is_console = kind == "Runtime.consoleAPICalled" and message["params"]["type"] in ("error", "warning")
        if is_log or is_console or kind in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.errors.append(content)


async def _first_page(session: aiohttp.ClientSession, port: str) -> str:
    """Where it is spoken to. The browser says its port before it has made a page."""
    while True:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = await answer.json()
        for target in targets:
            if target["type"] == "page":
                return target["webSocketDebuggerUrl"]
        await asyncio.sleep(0.02)


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a Chromium that is ended afterwards."""
    assert CHROMIUM
    profile = tempfile.mkdtemp(prefix="chromium-")
    process = subprocess.Popen(
        [CHROMIUM, *_FLAGS[:-1], f"--user-data-dir={profile}", _FLAGS[-1]],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    session = None
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "DevTools listening on" in line)
        port = line.split("127.0.0.1:")[1].split("/")[0]

        async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
            session = aiohttp.ClientSession()
            return session, await session.ws_connect(await _first_page(session, port), max_msg_size=0)

        session, socket = loop.run_until_complete(asyncio.wait_for(connect(), _TIMEOUT))
        yield Page(loop, socket)
    finally:
        if session is not None:
            with suppress(Exception):
                loop.run_until_complete(session.close())
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        loop.close()
        shutil.rmtree(profile, ignore_errors=True)
