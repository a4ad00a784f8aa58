"""OpenAI's Responses: https://platform.openai.com/docs/api-reference/responses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rltrain.agents.gateway import chat
from rltrain.agents.gateway.exchange import (
    Answer,
    Ask,
    arguments_of,
    bad,
    count,
    left_over,
    refuse,
    take,
    text_of,
)
from rltrain.sample import Message

API = "responses"
_TEXT = ("text", "input_text", "output_text", "refusal")
_ACTS = (
    "input", "model", "instructions", "tools", "max_output_tokens", "stream", "stream_options", "reasoning",
    "previous_response_id", "chat_template_kwargs", "enable_thinking",
)  # fmt: skip
# The reasoning is in the response in full, so a summary or an encrypted form is not needed.
_HARMLESS = ("include", "max_tool_calls", "client_metadata")
_NOTED = ("truncation", "context_management")
_REFUSED = {
    "background": "",
    "prompt": ": give its text",
    "conversation": ": give previous_response_id",
    "top_logprobs": "",
}


def read(body: Mapping[str, Any]) -> Ask:
    """The request.

    Raises:
        ApiError: something in it is wrong.
    """
    refuse(body, _REFUSED)
    if [each for each in take(body, "include", list, []) if each != "reasoning.encrypted_content"]:
        raise bad(
            "include: only reasoning.encrypted_content is accepted, and the reasoning is always included",
            "include",
        )
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise bad("input is missing or empty", "input")
    instructions = take(body, "instructions", str)
    lead: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    choice, text = body.get("tool_choice"), take(body, "text", dict, {})
    known = (*_ACTS, *_HARMLESS, *_REFUSED, *_NOTED, "text")
    noted = chat.not_followed(body, known, choice, text.get("format"))
    noted |= {name: body[name] for name in _NOTED if body.get(name) not in (None, "disabled", [])}
    noted |= {f"text.{name}": value for name, value in left_over(text, ["format"], ["verbosity"]).items()}
    return Ask(
        api=API,
        messages=lead + _read_items(given),
        tools=None if choice == "none" else _read_tools(take(body, "tools", list)),
        max_tokens=count(body, "max_output_tokens"),
        stream=take(body, "stream", bool, False),
        template_kwargs=chat.template_kwargs(body, take(body, "reasoning", dict, {}).get("effort")),
        not_followed=noted,
        previous=take(body, "previous_response_id", str),
        lead=len(lead),
        kept=True,
    )


def write(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> dict[str, Any]:
    """The response; `name` is its id."""
    answer = answers[0]
    cut = answer.finish == "length"
    return {
        **_head(model, ask, name),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": _items(answer, name),
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens},
            "output_tokens": answer.sampled_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": answer.prompt_tokens + answer.sampled_tokens,
        },
    }


def events(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> Iterator[tuple[str, Any]]:
    """The same in parts, as pairs of an event's name and its data."""
    for number, event in enumerate(_events(answers, model, ask, name)):
        yield event["type"], {**event, "sequence_number": number}


def _events(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> Iterator[dict[str, Any]]:
    whole = write(answers, model, ask, name)
    begun = {**whole, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for i, item in enumerate(whole["output"]):
        yield from _item_events(i, item)
    yield {"type": f"response.{whole['status']}", "response": whole}


def _item_events(i: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    where = {"output_index": i, "item_id": item["id"]}
    begun: dict[str, Any] = {**item, "status": "in_progress"}
    begun |= {"arguments": ""} if item["type"] == "function_call" else {"content": list[Any]()}
    yield {"type": "response.output_item.added", "output_index": i, "item": begun}
    if item["type"] == "function_call":
        kind, arguments = "response.function_call_arguments", item["arguments"]
        yield {"type": f"{kind}.delta", **where, "delta": arguments}
        yield {"type": f"{kind}.done", **where, "name": item["name"], "arguments": arguments}
    else:
        part = item["content"][0]
        is_text, at = part["type"] == "output_text", {**where, "content_index": 0}
        kind = "response.output_text" if is_text else "response.reasoning_text"
        more: dict[str, Any] = {"logprobs": []} if is_text else {}
        yield {"type": "response.content_part.added", **at, "part": {**part, "text": ""}}
        yield {"type": f"{kind}.delta", **at, "delta": part["text"], **more}
        yield {"type": f"{kind}.done", **at, "text": part["text"], **more}
        yield {"type": "response.content_part.done", **at, "part": part}
    yield {"type": "response.output_item.done", "output_index": i, "item": item}


def _read_items(items: list[Any]) -> list[Message]:
    """The items as messages; what the model wrote in one turn, in several items, is one message."""
    messages: list[Message] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise bad(f"{where} is {item!r:.80}; expected an object", where)
        message = _read_item(item, item.get("type") or "message", where)
        if message["role"] == "assistant" and messages and messages[-1]["role"] == "assistant":
            _join(messages[-1], message)
        else:
            messages.append(message)
    return messages


def _read_item(item: Mapping[str, Any], kind: str, where: str) -> Message:
    if kind == "message":
        if item.get("role") not in ("user", "assistant", "system", "developer"):
            raise bad(f"{where}.role is {item.get('role')!r:.80}", where)
        text = text_of(item.get("content"), f"{where}.content", _TEXT)
        return {"role": "system" if item["role"] == "developer" else item["role"], "content": text}
    if kind == "function_call":
        arguments = arguments_of(item.get("arguments", "{}"), f"{where}.arguments")
        function = {"name": take(item, "name", str, ""), "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
    if kind == "function_call_output":
        output = text_of(item.get("output"), f"{where}.output", _TEXT)
        return {"role": "tool", "content": output, "tool_call_id": take(item, "call_id", str, "")}
    if kind == "reasoning":
        parts = take(item, "content", list, [])
        thought = text_of(parts, f"{where}.content", ("reasoning_text",))
        return {"role": "assistant", "content": "", "reasoning_content": thought}
    raise bad(f"{where} has the type {kind!r}, which the model can't take", where)


def _join(message: Message, more: Message) -> None:
    message["content"] += more["content"]
    for name in ("reasoning_content", "tool_calls"):
        if more.get(name):
            message[name] = message[name] + more[name] if message.get(name) else more[name]


def _read_tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The functions as Chat Completions have them."""
    read = []
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function" or not isinstance(tool.get("name"), str):
            raise bad(
                f"tools[{i}] has the type {kind!r}: only the agent's own functions work here",
                f"tools[{i}]",
            )
        function = {
            name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name)
        }
        read.append({"type": "function", "function": function})
    return read or None


def _head(model: str, ask: Ask, name: str) -> dict[str, Any]:
    tools = [
        {"type": "function", "parameters": {}, "strict": False, **each["function"]}
        for each in ask.tools or ()
    ]
    return {
        "id": f"resp_{name}", "object": "response", "created_at": int(time.time()), "model": model, "error": None,
        "instructions": ask.messages[0]["content"] if ask.lead else None, "max_output_tokens": ask.max_tokens,
        "metadata": {}, "parallel_tool_calls": True, "previous_response_id": ask.previous, "temperature": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": tools, "top_p": None,
        "truncation": "disabled",
    }  # fmt: skip


def _items(answer: Answer, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if answer.reasoning:
        thought = {"type": "reasoning_text", "text": answer.reasoning}
        items.append({"id": f"rs_{name}", "type": "reasoning", "summary": [], "content": [thought]})
    if answer.content or not answer.tool_calls:
        text = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        status = "incomplete" if answer.finish == "length" else "completed"
        items.append(
            {"id": f"msg_{name}", "type": "message", "role": "assistant", "status": status, "content": [text]}
        )
    for i, call in enumerate(answer.tool_calls):
        function = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append({"id": f"fc_{name}_{i}", "type": "function_call", "status": "completed", **function})
    return items
