"""From the messages of a request to token ids, without tokenising again what the model wrote itself.

An agent sends its whole conversation as text each time. Where it begins with one that a turn holds, and the chat
template renders that part as before, the turn's tokens are taken as they are, and only what is new is tokenised. A
message counts as unchanged if it says what the agent was told: reasoning that the client's library has left out is
put back first, and the spaces in a tool call's JSON don't matter. Where the template itself rewrites the history, as
those do that remove the reasoning of earlier turns, everything is tokenised anew: the model then reads what it will
read once it is deployed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.agents.gateway.exchange import Ask, bad
from rltrain.sample import Message

_MARK = "The answer is 42."


@dataclass(frozen=True)
class Held:
    """A turn and its conversation.

    Attributes:
        turn: its number.
        message: what the model answered, with its reasoning.
        position: index of that message in a conversation that goes on from here.
        rendered: the text of its prompt as the template made it.
        before: the turn that it goes on from.
    """

    turn: int
    message: Message
    position: int
    rendered: str
    before: Held | None


@dataclass(frozen=True)
class Prompt:
    """What to send to the engine.

    Attributes:
        ids: of all tokens; `text` where they are still to be made.
        held: the turn whose tokens the ids begin with, by the agent's messages.
        rewritten: the history is a held one, but the template renders it differently now.
        key: of the conversation, without the response to come.
        rendered: the text as the template makes it.
    """

    ids: list[int] | None
    held: Held | None
    rewritten: bool
    key: bytes
    rendered: str


class Conversations:
    """The conversations of one session, by what is said in them."""

    def __init__(self, templates: Templates) -> None:
        self._templates = templates
        self._held: dict[bytes, Held] = {}

    def prompt(self, ask: Ask, tokens: Callable[[int], Sequence[int]]) -> Prompt:
        """The prompt of a request; `tokens` gives all ids of a turn.

        Raises:
            ApiError: the chat template can't render the messages.
        """
        keys = _keys(ask)
        held = self._longest(keys, ask.messages)
        messages = _restored(ask.messages, held)
        rendered = self._templates.render(messages, ask)
        if held is None:
            return Prompt(None, None, False, keys[-1], rendered)
        new = self._new_text(messages, ask, held, rendered, tokens(held.turn))
        if new is None:
            return Prompt(None, held, True, keys[-1], rendered)
        ids = [*tokens(held.turn), *self._templates.encode(new)]
        return Prompt(ids, held, False, keys[-1], rendered)

    def hold(self, ask: Ask, prompt: Prompt, turn: int, message: Message) -> None:
        """From now on, a conversation that begins with this one goes on from this turn."""
        before = prompt.held
        self._held[_next_key(prompt.key, message)] = Held(
            turn, message, len(ask.messages), prompt.rendered, before
        )

    def forget(self, turn: int) -> None:
        """No conversation goes on from this turn any more."""
        self._held = {key: held for key, held in self._held.items() if held.turn != turn}

    def _longest(self, keys: list[bytes], messages: list[Message]) -> Held | None:
        for key in reversed(keys):
            held = self._held.get(key)
            if held is not None and not _contradicts(messages, held):
                return held
        return None

    def _new_text(
        self, messages: list[Message], ask: Ask, held: Held, rendered: str, ids: Sequence[int]
    ) -> str | None:
        """What comes after the tokens of `held`; None if the template has changed what was before."""
        closing = self._templates.closing
        if closing is None:
            return None
        before = self._templates.render(messages[: held.position + 1], ask, open_answer=False)
        if not (
            before.startswith(held.rendered) and before.endswith(closing) and rendered.startswith(before)
        ):
            return None
        return self._templates.unwritten(closing, ids) + rendered[len(before) :]


class Templates:
    """The model's chat template and tokenizer.

    Attributes:
        closing: what the template writes after an answer; None if that can't be found.
        special_ids: tokens that end an answer, and are no part of it.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any]) -> None:
        self.tokenizer, self._kwargs = tokenizer, kwargs
        self.closing = self._find_closing()
        self.special_ids = frozenset(tokenizer.all_special_ids)

    def render(self, messages: list[Message], ask: Ask, *, open_answer: bool = True) -> str:
        """The conversation as text, which ends where the model's answer begins.

        Raises:
            ApiError: the template refuses it.
        """
        try:
            return str(self._render(messages, ask.tools, open_answer, ask.template_kwargs))
        except Exception as error:  # whatever a template raises, of Jinja's errors or Python's
            raise bad(f"the model's chat template can't render these messages: {error}", "messages") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def without_effect(self, kwargs: Mapping[str, Any]) -> list[str]:
        """The names that the template does not have; one of the two ways to end thinking is enough."""
        unknown = [name for name in kwargs if name not in str(self.tokenizer.chat_template)]
        ways = {"reasoning_effort", "enable_thinking"}
        if kwargs.get("reasoning_effort") == "none" and not ways <= set(unknown):
            return [name for name in unknown if name not in ways]
        return unknown

    def unwritten(self, closing: str, ids: Sequence[int]) -> str:
        """What the template writes after an answer and the model, which wrote `ids`, has not."""
        tail = self.decode(ids[-min(len(ids), 2 * len(closing)) :])
        for size in range(len(closing), 0, -1):
            if tail.endswith(closing[:size]):
                return closing[size:]
        return closing

    def _render(self, messages: list[Message], tools: Any, open_answer: bool, kwargs: dict[str, Any]) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=open_answer, **self._kwargs | kwargs
        )

    def _find_closing(self) -> str | None:
        """What the template writes after an answer; None for a template in which that can't be found."""
        question = {"role": "user", "content": "What is it?"}
        try:
            text = self._render([question, {"role": "assistant", "content": _MARK}], None, False, {})
        except Exception:
            return None
        _, mark, closing = str(text).rpartition(_MARK)
        return closing if mark else None


def _keys(ask: Ask) -> list[bytes]:
    """A key for the content of every beginning of the conversation, the empty one included."""
    key = _digest(b"", [ask.tools, ask.template_kwargs])
    keys = [key]
    for message in ask.messages:
        key = _next_key(key, message)
        keys.append(key)
    return keys


def _next_key(key: bytes, message: Message) -> bytes:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [message["role"], message.get("content") or "", calls]
    return _digest(key, said)


def _digest(before: bytes, value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(before + text.encode(), digest_size=16).digest()


def _contradicts(messages: list[Message], held: Held) -> bool:
    """Whether the conversation has other reasoning than the turn and those before it."""
    each: Held | None = held
    while each is not None:
        given = (messages[each.position].get("reasoning_content") or "").strip()
        if given and given != (each.message.get("reasoning_content") or "").strip():
            return True
        each = each.before
    return False


def _restored(messages: list[Message], held: Held | None) -> list[Message]:
    """The messages, with what the model really answered in its places."""
    if held is None:
        return messages
    messages = list(messages)
    each: Held | None = held
    while each is not None:
        messages[each.position] = each.message
        each = each.before
    return messages
