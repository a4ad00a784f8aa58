"""The gateway: one HTTP server in the rollout process, behind which every session has its own URL and key.

A request goes to the router's `/generate` as token ids. Its response is there as a whole before the agent gets any of
it, streamed or not: an engine that dies meanwhile is asked again, and the agent does not notice. While a stream
waits, comments or pings keep it open.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web

from rltrain.agents.gateway import anthropic, chat, responses
from rltrain.agents.gateway.exchange import Answer, ApiError, Ask
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.prompts import Templates
from rltrain.agents.gateway.session import Limits, Model, Session
from rltrain.agents.gateway.turnstile import Turnstile
from rltrain.arguments.config import Config
from rltrain.data.tokenizer import load_tokenizer
from rltrain.rollout.generate.single_turn import SamplingParams
from rltrain.run.errors import UserError
from rltrain.run.http import make_url
from rltrain.sample import Sample

_MOST_BYTES = 32 << 20  # of a request
_PATIENCE = 5.0  # seconds until a stream begins without an answer, and between two pings
_SESSION = web.RequestKey("session", Session)

Body = Mapping[str, Any]
Events = Iterator[tuple[str | None, Any]]


@dataclass(frozen=True)
class Protocol:
    """One way to ask.

    Attributes:
        write: the response: answers, model, request, id.
        events: its parts, if streamed: the same, and the body.
        error: the body of an error.
        ping: what keeps a stream open.
        done: what ends it.
    """

    path: str
    read: Callable[[Body], Ask]
    write: Callable[[Sequence[Answer], str, Ask, str], dict[str, Any]]
    events: Callable[[Sequence[Answer], str, Ask, str, Body], Events]
    error: Callable[[ApiError], dict[str, Any]]
    error_event: str | None = None
    ping: bytes = b": ping\n\n"
    done: bytes = b""


def _chat_events(answers: Sequence[Answer], model: str, ask: Ask, name: str, body: Body) -> Events:
    return chat.events(answers, model, ask, name, body.get("stream_options"))


def _without_body(events: Callable[[Sequence[Answer], str, Ask, str], Events]) -> Callable[..., Events]:
    return lambda answers, model, ask, name, _: events(answers, model, ask, name)


_CHAT = Protocol(
    "/v1/chat/completions", chat.read, chat.write, _chat_events, chat.error_body, done=b"data: [DONE]\n\n"
)
_RESPONSES = Protocol(
    "/v1/responses", responses.read, responses.write, _without_body(responses.events), chat.error_body
)
_MESSAGES = Protocol(
    "/v1/messages",
    anthropic.read,
    anthropic.write,
    _without_body(anthropic.events),
    anthropic.error_body,
    error_event="error",
    ping=anthropic.PING,
)
_PROTOCOLS = (_CHAT, _RESPONSES, _MESSAGES)


class Gateway:
    """Use as an async context manager; `open` a session for every sample."""

    def __init__(self, config: Config, host: str, parsers: Parsers | None = None) -> None:
        """Not yet listening.

        Args:
            config: names the model, its chat template and the router.
            host: address to listen at: the loopback, or one that only the job's network reaches.
            parsers: of the model, if they were made already.
        """
        tokenizer = load_tokenizer(config.model.hf_checkpoint)
        self._tokenizer, self._parsers = tokenizer, parsers
        self._config, self._host = config, host
        self._templates = Templates(tokenizer, config.data.apply_chat_template_kwargs)
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        self.origin = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Listen, once the model's parsers are loaded, which takes some seconds.

        Raises:
            UserError: the tokenizer has no chat template, or the parsers can't be loaded.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise UserError(
                f"--agent-gateway: the tokenizer of {self._config.model.hf_checkpoint} has no chat template, which"
                " messages need. Take a model that has one."
            )
        if self._parsers is None:
            self._parsers = await asyncio.to_thread(Parsers, self._tokenizer, self._config.engines.sglang)
        name = self._config.model.hf_checkpoint.rstrip("/").rsplit("/", 1)[-1]
        self._model = Model(self._config, name, self._templates, self._parsers, Turnstile())
        app = web.Application(middlewares=[self._guard], client_max_size=_MOST_BYTES)
        app.add_routes(self._routes())
        # Who leaves is not worked for any more.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, 0, backlog=1024).start()
        host, port = self._runner.addresses[0][:2]
        self.origin = make_url(host, port)

    async def close(self) -> None:
        """End every session, and listen no more."""
        self._sessions.clear()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    @contextlib.asynccontextmanager
    async def open(
        self,
        sample: Sample,
        sampling_params: SamplingParams,
        *,
        max_turns: int | None = None,
        max_tokens: int | None = None,
    ) -> AsyncIterator[Session]:
        """A session for this sample, sampled with these parameters; its key is of no use afterwards.

        Args:
            sample: what the session's samples are copies of.
            sampling_params: as a generation function is given them; they hold, whatever an agent asks for.
            max_turns: responses that the session may have; None: any number.
            max_tokens: tokens that all its responses together may have.
        """
        limits = Limits(max_turns, max_tokens)
        session = Session(self._model, sample, sampling_params, limits, self.origin)
        self._sessions[session.id] = session
        try:
            yield session
        finally:
            self._sessions.pop(session.id, None)

    def _routes(self) -> list[web.RouteDef]:
        routes = [web.post(f"/s/{{session}}{each.path}", _handler(each)) for each in _PROTOCOLS]
        return [
            *routes,
            web.post(f"/s/{{session}}{_MESSAGES.path}/count_tokens", _count_tokens),
            web.get("/s/{session}/v1/models", _models),
            web.get("/s/{session}/v1/models/{model:.+}", _model),
        ]

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Lets in who has the key of the session in the URL, and answers errors in the protocol's form."""
        protocol = _protocol_of(request)
        try:
            request[_SESSION] = self._session(request)
            return await handler(request)
        except ApiError as error:
            return _error(protocol, error)
        except web.HTTPException as error:
            return _error(protocol, ApiError(error.status, error.text or str(error.reason)))
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            return _error(protocol, ApiError(500, f"the gateway failed: {type(error).__name__}"))

    def _session(self, request: web.Request) -> Session:
        session = self._sessions.get(request.path.removeprefix("/s/").partition("/")[0])
        given = request.headers.get("x-api-key") or request.headers.get("Authorization") or ""
        key = given.removeprefix("Bearer ").encode()
        if session is None or not hmac.compare_digest(key, session.api_key.encode()):
            raise ApiError(
                401, "no session has this URL and key; a session's key ends with it", code="invalid_api_key"
            )
        return session


def _protocol_of(request: web.Request) -> Protocol:
    path = "/" + request.path.removeprefix("/s/").partition("/")[2]
    asks = next((each for each in _PROTOCOLS if path.startswith(each.path)), None)
    return asks or (_MESSAGES if "anthropic-version" in request.headers else _CHAT)


def _handler(protocol: Protocol) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        session, body = request[_SESSION], await _json(request)
        _check_model(body, session)
        ask, name = protocol.read(body), secrets.token_hex(12)
        if not ask.stream:
            answers = await session.ask(ask)
            _keep(session, protocol, ask, answers, name)
            return _json_response(protocol.write(answers, session.model, ask, name))
        return await _stream(request, protocol, session, ask, body, name)

    return handle


async def _stream(
    request: web.Request, protocol: Protocol, session: Session, ask: Ask, body: Body, name: str
) -> web.StreamResponse:
    asking = asyncio.ensure_future(session.ask(ask))
    answers: list[Answer] = []
    try:
        await asyncio.wait([asking], timeout=_PATIENCE)
        if asking.done():
            answers = asking.result()  # an error still has its status
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        while not asking.done():
            await response.write(protocol.ping)
            await asyncio.wait([asking], timeout=_PATIENCE)
        try:
            answers = asking.result()
        except ApiError as error:
            await response.write(_event(protocol.error_event, protocol.error(error)))
        else:
            _keep(session, protocol, ask, answers, name)
            parts = protocol.events(answers, session.model, ask, name, body)
            await response.write(b"".join(_event(*part) for part in parts) + protocol.done)
        await response.write_eof()
        return response
    except (ConnectionError, asyncio.CancelledError):
        if not answers and asking.done() and not asking.cancelled() and not asking.exception():
            answers = asking.result()
        asking.cancel()
        session.undelivered(answers)
        session.record.note("disconnected", "the client left before it had its answer")
        raise


def _keep(session: Session, protocol: Protocol, ask: Ask, answers: Sequence[Answer], name: str) -> None:
    if ask.kept:
        session.keep(f"{'resp' if protocol is _RESPONSES else 'msg'}_{name}", ask, answers[0])


async def _count_tokens(request: web.Request) -> web.Response:
    session, body = request[_SESSION], await _json(request)
    _check_model(body, session)
    return _json_response({"input_tokens": session.count(anthropic.read_to_count(body))})


async def _models(request: web.Request) -> web.Response:
    return _json_response(chat.models(request[_SESSION].model))


async def _model(request: web.Request) -> web.Response:
    _check_model({"model": request.match_info["model"]}, request[_SESSION])
    return _json_response(chat.model_card(request[_SESSION].model))


async def _json(request: web.Request) -> Body:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body


def _check_model(body: Body, session: Session) -> None:
    if body.get("model") != session.model:
        raise ApiError(
            404,
            f"no model {body.get('model')!r:.80}; this session has {session.model!r}",
            code="model_not_found",
            param="model",
        )


def _json_response(body: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(body).encode(), content_type="application/json")


def _error(protocol: Protocol, error: ApiError) -> web.Response:
    response = _json_response(protocol.error(error))
    response.set_status(error.status)
    return response


def _event(name: str | None, data: Any) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


_running: Gateway | None = None


def set_gateway(gateway: Gateway | None) -> None:
    """Make `gateway` the one of this process: generation functions are called without any."""
    global _running
    _running = gateway


def running_gateway() -> Gateway:
    """The gateway of this rollout process.

    Raises:
        UserError: none was asked for.
    """
    if _running is None:
        raise UserError("no gateway runs in this process: add --agent-gateway.")
    return _running
