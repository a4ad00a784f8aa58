"""Keeps external engines behind the router: they come and go, and generate only with the trainer's current weights."""

from __future__ import annotations

from typing import Protocol

from rltrain.arguments.groups.engines import Engines
from rltrain.arguments.groups.model import Model
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError
from rltrain.run.layout import RunLayout
from rltrain.sglang.engines import ExternalEngine, check_engine, external_engines
from rltrain.sglang.health import is_loading
from rltrain.sglang.routers import RouterAddress, find_worker, remove_worker
from rltrain.weights.transports.current import current_weights, load_from_disk, weight_version

_PROBE_SECONDS = 5.0
_REGISTER_SECONDS = 20.0
_TROUBLE = (OSError, HttpError, TimeoutError, UserError)


class EventSink(Protocol):
    """What is needed of `rltrain.run.role.Registry`."""

    def event(self, kind: str, **fields: object) -> None:
        """Append an event."""


class ExternalFleet:
    """Keeps the router's list of external engines as it should be; call `look` every few seconds."""

    def __init__(self, flags: Engines, model: Model, layout: RunLayout, events: EventSink) -> None:
        self._flags, self._model, self._layout, self._events = flags, model, layout, events
        self._joined: dict[str, ExternalEngine] = {}
        self._last_words: dict[str, str] = {}

    def look(self, router: RouterAddress) -> None:
        """Take engines off the router that are gone, hang or have other weights; load the current ones and add them.

        Nothing is done while the trainer hands out weights: it speaks to these engines itself.
        """
        if is_loading(self._layout):
            return
        try:
            named = {engine.url: engine for engine in external_engines(self._flags)}
        except (OSError, UserError) as error:  # a file that is being edited: engines that are there stay
            self._say("", str(error))
            return
        for url in set(self._joined) - set(named):
            self._leave(router, url, "it is no longer named")
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
            self._leave(router, engine.url, "its weights differ from the trainer's")
            check_engine(self._model, engine)
            load_from_disk(engine, newest)
        if find_worker(router.url, router.token, engine.url) is None:
            engine.register(router.url, _REGISTER_SECONDS, router.token)
            self._joined[engine.url] = engine
            self._last_words.pop(engine.url, None)
            self._events.event("external_engine_joined", url=engine.url, version=weight_version(newest))

    def _leave(self, router: RouterAddress, url: str, why: str) -> None:
        try:
            if find_worker(router.url, router.token, url) is None:
                return
            remove_worker(router.url, router.token, url)
        except _TROUBLE as error:
            self._say(url, f"external engine {url} can't be removed from the router: {error}")
            return
        self._joined.pop(url, None)
        self._events.event("external_engine_left", url=url, reason=why)

    def _say(self, url: str, words: str) -> None:
        if self._last_words.get(url) != words:
            self._last_words[url] = words
            print(words, flush=True)
