"""What every protocol is translated into: what an agent asks, what it is answered, and errors.

Messages have the form that chat templates take: `role`, `content` as text, `reasoning_content`, `tool_calls` with
parsed arguments, `tool_call_id`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rltrain.sample import Message

THREAD_NOT_FOUND = "thread_not_found"  # a code at which Anthropic's client sends the whole conversation again

Finish = Literal["stop", "length", "tool_calls", "stop_word"]


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        tools: in the form of Chat Completions; None for none.
        max_tokens: of a response; None: as many as the run allows.
        stop: stop words beside the run's.
        template_kwargs: for the chat template, beside the run's.
        not_followed: fields of the request that have no effect, which readers of the run should know.
        log_probs: whether the agent wants those of the tokens.
        kept: whether a later request may go on with the response by its id.
        thread: Anthropic's, in which the tools of the first request are those of all.
        previous: id of the response whose conversation goes on with `messages`.
        lead: how many of the messages are instructions for this response only.
    """

    api: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    not_followed: dict[str, Any] = field(default_factory=dict)
    previous: str | None = None
    lead: int = 0
    log_probs: bool = False
    kept: bool = False
    thread: bool = False


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """One response, as the agent sees it: of the turn with this number. Counts are in tokens."""

    turn: int
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish = "stop"
    stop_word: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    reasoning_tokens: int = 0
    log_probs: tuple[tuple[str, float], ...] = ()  # text and log-prob of each token, if wanted


def as_message(content: str, reasoning: str, calls: Sequence[ToolCall]) -> Message:
    """A response as a chat template takes it."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in calls
        ]
    return message


def arguments_of(text: Any, where: str) -> Any:
    """A tool call's arguments as a chat template takes them; text that is not JSON stays text.

    Raises:
        ApiError: it is neither text nor an object.
    """
    if isinstance(text, dict):
        return text
    if not isinstance(text, str):
        raise bad(f"{where} is {text!r:.80}; expected JSON as text", where)
    try:
        return json.loads(text)
    except ValueError:
        return text


class ApiError(Exception):
    """An answer to an agent, in its protocol's own form.

    Attributes:
        status: of HTTP.
        code: OpenAI's word for it, where there is one.
        param: the field that is wrong.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def bad(message: str, param: str | None = None) -> ApiError:
    """A request that can't be right."""
    return ApiError(400, message, param=param)


_KINDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def take(body: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of the request, or the default where it is missing or null.

    Raises:
        ApiError: it has another type.
    """
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise bad(f"{name} is {value!r:.80}; expected {_KINDS[kind]}", name)
    return value


def count(body: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A field that is a whole number of at least 1."""
    value: int | None = take(body, name, int, default)
    if value is not None and value < 1:
        raise bad(f"{name} is {value}; it must be at least 1", name)
    return value


def refuse(body: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse fields that would change what a response is.

    Args:
        body: the request.
        names: each of these fields, and what to do without it.

    Raises:
        ApiError: one of them is there, and not empty.
    """
    for name, instead in names.items():
        if body.get(name):
            raise bad(f"{name} can't be used here{instead}", name)


def left_over(body: Mapping[str, Any], known: Collection[str], noted: Collection[str] = ()) -> dict[str, Any]:
    """Fields that change nothing here, and say something: those that are only noted.

    Args:
        body: the request, or a part of it.
        known: fields that are read elsewhere, or that are without meaning here.
        noted: fields that are accepted without effect.

    Raises:
        ApiError: there is another field: the response that it requires is unknown.
    """
    found = {}
    for name, value in body.items():
        if name in known or value is None or value is False or value in ("", [], {}):
            continue
        if name not in noted:
            raise bad(f"{name} can't be used here: it has no effect", name)
        found[name] = value
    return found


def text_of(content: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """The text of a message's content: a text, or a list of parts that are text.

    Raises:
        ApiError: there is a part that isn't, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{where} is {content!r:.80}; expected a text or a list of parts", where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise bad(f"{where}[{i}] has the type {kind!r}: the model takes text only", f"{where}[{i}]")
        texts.append(take(part, "refusal" if kind == "refusal" else "text", str, ""))
    return "".join(texts)
