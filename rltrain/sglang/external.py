"""External engines: which come and go while the run goes on, and generate only with the trainer's current weights."""

from __future__ import annotations

import argparse
from typing import Protocol

from hpc.layout import RunLayout
from rltrain.arguments.errors import UserError
from rltrain.sglang import workers
from rltrain.sglang.check import check_engine
from rltrain.sglang.engine import is_loading
from rltrain.sglang.engines import ExternalEngine, external_engines
from rltrain.sglang.http import HttpError
from rltrain.sglang.routers import RouterAddress
from rltrain.weights.current import current_weights, load_weights, weight_version

_PROBE_SECONDS = 5.0
_REGISTER_SECONDS = 20.0
_TROUBLE = (OSError, HttpError, TimeoutError, UserError)


class EventSink(Protocol):
    """What is needed of `rltrain.runtime.Registry`."""

    def event(self, kind: str, **fields: object) -> None:
        """Append an event."""


class ExternalFleet:
    """Keeps the router's list of external engines as it should be; call `look` every few seconds."""

    def __init__(self, args: argparse.Namespace, layout: RunLayout, events: EventSink) -> None:
        self._args, self._layout, self._events = args, layout, events
        self._joined: dict[str, ExternalEngine] = {}
        self._last_words: dict[str, str] = {}

    def look(self, router: RouterAddress) -> None:
        """Take off the router who has gone, hangs or has other weights; add who has the current ones, or load them.

        Nothing is done while the trainer hands out weights: it speaks to these engines itself.
        """
        if is_loading(self._layout):
            return
        try:
            named = {engine.url: engine for engine in external_engines(self._args)}
        except (OSError, UserError) as error:  # a file that is being edited: who is there stays
            self._say("", str(error))
            return
        for url in set(self._joined) - set(named):
            self._leave(router, url, "it is not named any more")
        for url, engine in named.items():
            try:
                self._bring_up_to_date(router, engine)
            except _TROUBLE as error:
                self._say(url, f"external engine {url}: {error}")
                self._leave(router, url, str(error))

    def _bring_up_to_date(self, router: RouterAddress, engine: ExternalEngine) -> None:
        newest = current_weights(self._layout.weights)
        if newest is None:  # the trainer has not sent any yet
            return
        if not engine.makes_progress(_PROBE_SECONDS):
            raise TimeoutError("it does not answer, or hangs")
        if engine.get_weight_version() != str(weight_version(newest)):
            self._leave(router, engine.url, "it has other weights than the trainer sent")
            check_engine(self._args, engine)
            load_weights(engine, newest)
        if workers.find_worker(router.url, router.token, engine.url) is None:
            engine.register(router.url, _REGISTER_SECONDS, router.token)
            self._joined[engine.url] = engine
            self._last_words.pop(engine.url, None)
            self._events.event("external_engine_joined", url=engine.url, version=weight_version(newest))

    def _leave(self, router: RouterAddress, url: str, why: str) -> None:
        try:
            if workers.find_worker(router.url, router.token, url) is None:
                return
            workers.remove_worker(router.url, router.token, url)
        except _TROUBLE as error:
            self._say(url, f"external engine {url} can't be taken off the router: {error}")
            return
        self._joined.pop(url, None)
        self._events.event("external_engine_left", url=url, reason=why)

    def _say(self, url: str, words: str) -> None:
        if self._last_words.get(url) != words:
            self._last_words[url] = words
            print(words, flush=True)
