"""One session: an agent's requests, sampled turn by turn, within its limits; in the end its samples."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rltrain.agents.gateway.exchange import (
    THREAD_NOT_FOUND,
    Answer,
    ApiError,
    Ask,
    Finish,
    ToolCall,
    as_message,
)
from rltrain.agents.gateway.parsers import Parsed, Parsers
from rltrain.agents.gateway.prompts import Conversations, Prompt, Templates
from rltrain.agents.gateway.record import Origin, SessionRecord, TurnRecord
from rltrain.agents.gateway.turnstile import Turnstile
from rltrain.agents.trajectory import Sampled, Trajectory, Turn, to_samples
from rltrain.arguments.config import Config
from rltrain.rollout.generate import timing
from rltrain.rollout.generate.group import gather_or_cancel
from rltrain.rollout.generate.http import GenerationError
from rltrain.rollout.generate.single_turn import SamplingParams, generate
from rltrain.sample import Message, Sample

_MOST_IN_FLIGHT = 64  # requests of a session at the engines; more wait
_MOST_CHOICES = 128
_LONG = 100_000  # characters that take so long to tokenise that others should not wait
_CHARACTERS = 64  # of the longest token that one need reckon with


@dataclass(frozen=True)
class Limits:
    """Of one session; None: no limit. `tokens` are sampled ones."""

    turns: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Model:
    """What all sessions of a gateway share."""

    config: Config
    name: str
    templates: Templates
    parsers: Parsers
    turnstile: Turnstile


class Session:
    """What an agent did. Made by `Gateway.open`, which also says where it is reached.

    Attributes:
        id: part of the URL.
        api_key: what every request must carry.
        base_url: for OpenAI's clients; ends with /v1.
        anthropic_base_url: for Anthropic's.
        model: name of the model.
        aborted: the rollout was stopped: what is asked from now on is refused.
        fault: the last request that the engines did not answer, in their words; not the agent's doing.
    """

    def __init__(
        self, shared: Model, sample: Sample, params: SamplingParams, limits: Limits, origin: str
    ) -> None:
        self.id, self.api_key = secrets.token_urlsafe(9), f"sk-{secrets.token_urlsafe(24)}"
        self.anthropic_base_url = f"{origin}/s/{self.id}"
        self.base_url = f"{self.anthropic_base_url}/v1"
        self.model = shared.name
        self.aborted = False
        self.fault: str | None = None
        self.record = SessionRecord()
        self.trajectory = Trajectory()
        self._shared, self._sample, self._params, self._limits = shared, sample, params, limits
        self._conversations = Conversations(shared.templates)
        self._responses: dict[str, Ask] = {}
        self._clock = timing.current_clock()
        self._slots = asyncio.Semaphore(_MOST_IN_FLIGHT)
        self._begun = self._spent = 0

    @property
    def turns(self) -> list[TurnRecord]:
        """The turns so far, in the order of their responses."""
        return list(self.record.turns.values())

    @property
    def sampled_tokens(self) -> int:
        """Tokens sampled so far."""
        return self._spent

    def samples(self) -> list[Sample]:
        """What the session is trained on: one sample for each path of its tree; none if nothing was sampled.

        The first one has the session's record in `metadata["agent_session"]`. If the rollout was stopped, the sample
        comes back as it was, to start over.
        """
        if self.aborted:
            self._sample.status = Sample.Status.ABORTED
            return [self._sample]
        paths = self.trajectory.paths()
        for i, path in enumerate(paths):
            for turn in path.turns:
                self.record.turns[turn.number].sample = i
        samples = to_samples(self.trajectory, self._sample, self._shared.templates.decode)
        for sample in samples[:1]:
            sample.metadata["agent_session"] = self.record.as_json(self.id)
        return samples

    async def ask(self, ask: Ask) -> list[Answer]:
        """`ask.n` responses.

        Raises:
            ApiError: the request can't be right, a limit is reached, or the engines do not answer.
        """
        async with self._shared.turnstile:
            ask = self._continued(ask)
            self._check(ask)
            self._begun += ask.n
            prompt = self._conversations.prompt(ask, self.trajectory.tokens)
            ids = self._encoded(prompt)
        if ids is None:
            ids = await asyncio.to_thread(self._shared.templates.encode, prompt.rendered)
        room = self._room(len(ids), ask.max_tokens)
        if prompt.rewritten and prompt.held is not None:
            self.record.note(
                "rewritten", "the chat template, or the client, renders earlier turns differently"
            )
        for name, value in ask.not_followed.items():
            self.record.note("not followed", f"{name}={value!r}: no effect, the run's own sampling applies")
        for name in self._shared.templates.without_effect(ask.template_kwargs):
            said = ask.template_kwargs[name]
            self.record.note("not followed", f"{name}={said!r}: the model's chat template does not know it")
        same = sum(turn.prompt_length == len(ids) for turn in self.trajectory.turns.values())
        tasks = [asyncio.ensure_future(self._answer(ask, prompt, ids, room, same + k)) for k in range(ask.n)]
        try:
            return list(await gather_or_cancel(tasks))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                self.record.note("disconnected", "the client left before it had its answer")
            self.undelivered(
                [
                    each.result()
                    for each in tasks
                    if each.done() and not (each.cancelled() or each.exception())
                ]
            )
            raise

    def undelivered(self, answers: Sequence[Answer]) -> None:
        """The agent has never seen these: they are not trained on."""
        for answer in answers:
            self.trajectory.discard(answer.turn)
            if answer.turn not in self.trajectory.turns:
                self.record.turns.pop(answer.turn, None)
                self._conversations.forget(answer.turn)

    def keep(self, response: str, ask: Ask, answer: Answer) -> None:
        """Later requests may continue this response by its id."""
        message = as_message(answer.content, answer.reasoning, answer.tool_calls)
        held = self._continued(ask)
        self._responses[response] = replace(held, messages=[*held.messages[ask.lead :], message])

    def _continued(self, ask: Ask) -> Ask:
        if ask.previous is None:
            return ask
        earlier = self._responses.get(ask.previous)
        if earlier is None:
            raise ApiError(
                404,
                f"this session has no response {ask.previous!r:.80}",
                code=THREAD_NOT_FOUND if ask.thread else None,
                param="previous_response_id",
            )
        messages = [*ask.messages[: ask.lead], *earlier.messages, *ask.messages[ask.lead :]]
        tools = earlier.tools if ask.thread else ask.tools
        return replace(ask, messages=messages, tools=tools, previous=None)

    def count(self, ask: Ask) -> int:
        """Tokens of the prompt that a request would have."""
        ask = self._continued(ask)
        prompt = self._conversations.prompt(ask, self.trajectory.tokens)
        return len(prompt.ids if prompt.ids is not None else self._shared.templates.encode(prompt.rendered))

    def _check(self, ask: Ask) -> None:
        if self.aborted:
            raise ApiError(403, "the rollout was stopped: this session has ended")
        if not ask.messages:
            raise ApiError(400, "there are no messages", param="messages")
        if ask.n > _MOST_CHOICES:
            raise ApiError(400, f"n is {ask.n}; it must be at most {_MOST_CHOICES}", param="n")
        self._shared.parsers.check_tools(ask.tools)
        turns, tokens = self._limits.turns, self._limits.tokens
        if turns is not None and self._begun + ask.n > turns:
            raise self._refused(f"the session may have {turns} turns, and has used {self._begun}")
        if tokens is not None and self._spent >= tokens:
            raise self._refused(f"the session may sample {tokens} tokens, and has sampled {self._spent}")

    def _refused(self, message: str) -> ApiError:
        self.record.note("limit", message)
        return ApiError(403, message, code="session_limit")

    def _encoded(self, prompt: Prompt) -> list[int] | None:
        """Its ids; None if they are still to be made, and that takes long."""
        if prompt.ids is not None:
            return prompt.ids
        context, text = self._context, prompt.rendered
        if len(text) > _CHARACTERS * context:
            raise _too_long(f"of {len(text)} characters", context)
        return self._shared.templates.encode(text) if len(text) <= _LONG else None

    @property
    def _context(self) -> int:
        length: int = self._shared.config.namespace.rollout_max_context_len
        return length

    def _room(self, prompt_length: int, asked: int | None) -> int:
        """Tokens that the response may have."""
        context = self._context
        if prompt_length >= context:
            raise _too_long(f"of {prompt_length} tokens", context)
        room = min(self._params["max_new_tokens"], context - prompt_length)
        if asked is not None:
            room = min(room, asked)
        if self._limits.tokens is not None:
            room = min(room, self._limits.tokens - self._spent)
        return room

    async def _answer(self, ask: Ask, prompt: Prompt, ids: list[int], room: int, copy: int) -> Answer:
        """One response; `copy` counts requests with the same prompt, which must not sample the same."""
        stop = [*(self._params.get("stop") or []), *ask.stop]
        params = {**self._params, "max_new_tokens": room, "stop": stop or None}
        if "sampling_seed" in params:
            params["sampling_seed"] = (params["sampling_seed"] + copy) & 0x7FFFFFFF
        began = self.record.now()
        response = await self._generate(ids, params)
        async with self._shared.turnstile:
            return self._hold(ask, prompt, ids, response, stop, began)

    def _hold(
        self, ask: Ask, prompt: Prompt, ids: list[int], response: Sample, stop: list[str], began: float
    ) -> Answer:
        """Makes the response a turn, and returns the answer to the agent."""
        sampled = Sampled(
            response.tokens[len(ids) :],
            response.rollout_log_probs or [],
            response.weight_version_spans,
            response.status,
            response.spec_info,
            response.prefix_cache_info,
        )
        self._spent += len(sampled.tokens)
        turn = self.trajectory.add(ids, sampled)
        shown = self._shown(sampled, prompt, ask, stop)
        message, answer = shown.message(), shown.answer(turn)
        if ask.log_probs:
            texts = (self._shared.templates.decode([token]) for token in sampled.tokens)
            answer = replace(answer, log_probs=tuple(zip(texts, sampled.log_probs, strict=True)))
        self._conversations.hold(ask, prompt, turn.number, message)
        self._remember(ask, prompt, turn, answer, began)
        return answer

    async def _generate(self, ids: list[int], params: SamplingParams) -> Sample:
        request = Sample(tokens=list(ids), session_id=f"{self._sample.session_id or self.id}")
        try:
            async with self._slots:
                if self.aborted:
                    raise ApiError(403, "the rollout was stopped: this session has ended")
                with timing.counted_to(self._clock):
                    response = await generate(self._shared.config.namespace, request, params)
        except GenerationError as error:
            self.fault = str(error)
            self.record.note("fault", self.fault)
            raise ApiError(503, f"the engines do not answer: {error}") from None
        if response.status is Sample.Status.ABORTED:
            self.aborted = True
            raise ApiError(403, "the rollout was stopped: this session has ended")
        if not response.response_length:
            raise ApiError(503, "the engine sampled nothing")
        return response

    def _shown(self, sampled: Sampled, prompt: Prompt, ask: Ask, stop: list[str]) -> _Shown:
        """The response as the agent sees it: in its parts, without what ended it."""
        templates, word = self._shared.templates, None
        ids = list(sampled.tokens)
        if sampled.status is Sample.Status.COMPLETED:
            while ids and ids[-1] in templates.special_ids:
                ids.pop()
        text = templates.decode(ids)
        if sampled.status is Sample.Status.COMPLETED and len(ids) == len(sampled.tokens):
            word = next((each for each in stop if text.endswith(each)), None)
            text = text[: len(text) - len(word)] if word else text
        parsed = self._shared.parsers.parse(text, prompt.rendered, ask.tools)
        if parsed.unparsed:
            self.record.note("unparsed", f"a tool call that can't be read: {parsed.content[-300:]!r}")
        calls = tuple(ToolCall(f"call_{secrets.token_hex(12)}", *call) for call in parsed.calls)
        finish: Finish = "stop_word" if word else "stop"
        if sampled.status is Sample.Status.TRUNCATED:
            finish = "length"
        elif calls:
            finish = "tool_calls"
        thought = len(templates.encode(parsed.reasoning)) if parsed.reasoning else 0
        return _Shown(parsed, calls, finish, word if word in ask.stop else None, thought, sampled)

    def _remember(self, ask: Ask, prompt: Prompt, turn: Turn, answer: Answer, began: float) -> None:
        held = prompt.held.turn if prompt.held is not None else None
        origin: Origin = "root" if turn.parent is None else "append"
        siblings = any(each.parent == turn.parent for each in self.turns)
        if (turn.parent is not None and siblings) or (held is not None and held != turn.parent):
            origin = "fork"
        self.record.turns[turn.number] = TurnRecord(
            turn=turn.number,
            parent=turn.parent,
            origin=origin,
            api=ask.api,
            began=round(began, 4),
            ended=round(self.record.now(), 4),
            prompt_tokens=turn.prompt_length,
            added_tokens=len(turn.added),
            sampled_tokens=len(turn.sampled.tokens),
            cached_tokens=answer.cached_tokens,
            finish=answer.finish,
            tools=[call.name for call in answer.tool_calls],
            forked_from=held if held != turn.parent else None,
        )


@dataclass(frozen=True)
class _Shown:
    parsed: Parsed
    calls: tuple[ToolCall, ...]
    finish: Finish
    stop_word: str | None
    reasoning_tokens: int
    sampled: Sampled

    def message(self) -> Message:
        """As the chat template takes it."""
        return as_message(self.parsed.content, self.parsed.reasoning, self.calls)

    def answer(self, turn: Turn) -> Answer:
        """As the protocols take it."""
        return Answer(
            turn=turn.number,
            content=self.parsed.content,
            reasoning=self.parsed.reasoning,
            tool_calls=self.calls,
            finish=self.finish,
            stop_word=self.stop_word,
            prompt_tokens=turn.prompt_length,
            cached_tokens=self.sampled.prefix_cache_info.cached_tokens,
            sampled_tokens=len(self.sampled.tokens),
            reasoning_tokens=self.reasoning_tokens,
        )


def _too_long(size: str, context: int) -> ApiError:
    return ApiError(
        400,
        f"the prompt {size} leaves no room for a response in a context of {context} tokens",
        code="context_length_exceeded",
        param="messages",
    )
