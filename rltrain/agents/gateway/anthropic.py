"""Anthropic's Messages: https://docs.anthropic.com/en/api/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rltrain.agents.gateway.exchange import (
    THREAD_NOT_FOUND,
    Answer,
    ApiError,
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

API = "messages"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_ACTS = (
    "messages", "model", "system", "max_tokens", "stop_sequences", "stream", "tools", "tool_choice", "thinking",
    "output_config", "thread",
)  # fmt: skip
# Of Anthropic's own service.
_HARMLESS = (
    "metadata", "service_tier", "cache_control", "inference_geo", "diagnostics", "user_profile_id", "workspace_id",
    "betas", "billing_policy", "fallbacks", "fallback_credit_token",
)  # fmt: skip
_NOTED = ("temperature", "top_p", "top_k", "speed", "context_management", "output_format")
_REFUSED = {"mcp_servers": ": give tools", "container": ""}
_STOPPED = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "stop_word": "stop_sequence",
}
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    500: "api_error", 503: "overloaded_error",
}  # fmt: skip


def read(body: Mapping[str, Any]) -> Ask:
    """The request.

    Raises:
        ApiError: something in it is wrong.
    """
    if count(body, "max_tokens") is None:
        raise bad("max_tokens is missing", "max_tokens")
    return _read(body, count(body, "max_tokens"))


def read_to_count(body: Mapping[str, Any]) -> Ask:
    """A request whose tokens are only counted."""
    return _read(body, None)


def _read(body: Mapping[str, Any], max_tokens: int | None) -> Ask:
    messages = take(body, "messages", list)
    if not messages:
        raise bad("messages is missing or empty", "messages")
    system = text_of(body.get("system"), "system")
    read: list[Message] = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(messages):
        read += _read_message(message, f"messages[{i}]")
    words = take(body, "stop_sequences", list, [])
    if not all(isinstance(word, str) and word for word in words):
        raise bad("stop_sequences is not a list of texts", "stop_sequences")
    refuse(body, _REFUSED)
    asked = left_over(body, (*_ACTS, *_HARMLESS), _NOTED)
    thread, previous = _read_thread(body)
    tool_choice, how = take(body, "tool_choice", dict, {}), take(body, "thinking", dict, {})
    choice, thinking = tool_choice.get("type"), how.get("type")
    if choice not in (None, "auto", "none", "any", "tool"):
        raise bad(f"tool_choice.type is {choice!r:.80}; expected auto, any, tool or none", "tool_choice")
    if choice in ("any", "tool"):
        asked["tool_choice"] = choice
    asked |= _of("tool_choice", tool_choice, ("type", "name"), ("disable_parallel_tool_use",))
    asked |= _of("thinking", how, ("type", "display"), ("budget_tokens",))
    output = take(body, "output_config", dict, {})
    asked |= _of("output_config", output, ("effort",), ("format", "task_budget"))
    kwargs: dict[str, Any] = {"enable_thinking": thinking != "disabled"} if thinking else {}
    if effort := take(output, "effort", str):
        kwargs["reasoning_effort"] = effort
    return Ask(
        api=API,
        messages=read,
        tools=None if choice == "none" else _read_tools(take(body, "tools", list)),
        max_tokens=max_tokens,
        stop=tuple(words),
        stream=take(body, "stream", bool, False),
        template_kwargs=kwargs,
        not_followed=asked,
        previous=previous,
        kept=thread,
        thread=thread,
    )


def _of(
    name: str, given: Mapping[str, Any], known: tuple[str, ...], noted: tuple[str, ...]
) -> dict[str, Any]:
    return {f"{name}.{each}": value for each, value in left_over(given, known, noted).items()}


def _read_thread(body: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether the conversation is held under the response's id, and the id of the one that it continues."""
    thread = take(body, "thread", dict)
    if thread is None:
        return False, None
    if thread.get("type") == "create":
        return True, None
    previous = take(thread, "previous_message_id", str)
    if thread.get("type") != "continue" or not previous:
        raise bad("thread is neither a create nor a continue with its previous_message_id", "thread")
    refuse(body, dict.fromkeys(("system", "tools"), ": a thread keeps the ones that it was created with"))
    return True, previous


def write(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> dict[str, Any]:
    """The response; `name` is its id."""
    answer = answers[0]
    return {
        **_head(answer, model, name),
        "content": _blocks(answer),
        "stop_reason": _STOPPED[answer.finish],
        "stop_sequence": answer.stop_word,
        "usage": _usage(answer),
    }


def events(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> Iterator[tuple[str, Any]]:
    """The same in parts, as pairs of an event's name and its data."""
    for event in _events(answers[0], model, name):
        yield event["type"], event


def _events(answer: Answer, model: str, name: str) -> Iterator[dict[str, Any]]:
    usage = _usage(answer)
    message = {**_head(answer, model, name), "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": {**message, "usage": {**usage, "output_tokens": 0}}}
    for i, block in enumerate(_blocks(answer)):
        if block["type"] == "tool_use":
            empty: dict[str, Any] = {**block, "input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        elif block["type"] == "thinking":
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            deltas = [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        else:
            empty, deltas = {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        yield {"type": "content_block_start", "index": i, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": i, "delta": delta}
        yield {"type": "content_block_stop", "index": i}
    ended = {"stop_reason": _STOPPED[answer.finish], "stop_sequence": answer.stop_word}
    yield {"type": "message_delta", "delta": ended, "usage": usage}
    yield {"type": "message_stop"}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    kind = _ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    details = {"details": {"error_code": error.code}} if error.code == THREAD_NOT_FOUND else {}
    return {"type": "error", "error": {"type": kind, "message": str(error), **details}}


def _read_message(message: Any, where: str) -> list[Message]:
    """A message as chat templates take it: results of tools become messages of their own, before the text."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
        raise bad(f"{where} is not a message of user, assistant or system", where)
    content, role = message.get("content"), message["role"]
    if role == "system":
        return [{"role": role, "content": text_of(content, f"{where}.content")}]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise bad(f"{where}.content is {content!r:.80}; expected a text or a list of blocks", where)
    blocks = [_block(block, f"{where}.content[{i}]") for i, block in enumerate(content)]
    if role == "assistant":
        return [_read_answer(blocks, f"{where}.content")]
    read: list[Message] = []
    texts = []
    for i, block in enumerate(blocks):
        at = f"{where}.content[{i}]"
        if block["type"] == "tool_result":
            result = text_of(block.get("content"), f"{at}.content")
            read.append(
                {"role": "tool", "content": result, "tool_call_id": take(block, "tool_use_id", str, "")}
            )
        else:
            texts.append(text_of([block], at))
    if texts or not read:
        read.append({"role": "user", "content": "".join(texts)})
    return read


def _read_answer(blocks: list[dict[str, Any]], where: str) -> Message:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        at = f"{where}[{i}]"
        if block["type"] == "tool_use":
            name = take(block, "name", str, "")
            arguments = arguments_of(block.get("input", {}), f"{at}.input")
            calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        elif block["type"] == "thinking":
            thoughts.append(take(block, "thinking", str, ""))
        elif block["type"] != "redacted_thinking":
            texts.append(text_of([block], at))
    message: Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _block(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise bad(f"{where} is not a block with a type", where)
    return block


def _read_tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The tools as Chat Completions have them."""
    read = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or "input_schema" not in tool:
            raise bad(f"tools[{i}] is not a tool with a name and an input_schema", f"tools[{i}]")
        function = {"name": tool["name"], "description": tool.get("description") or ""}
        read.append({"type": "function", "function": {**function, "parameters": tool["input_schema"]}})
    return read or None


def _head(answer: Answer, model: str, name: str) -> dict[str, Any]:
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": model}


def _blocks(answer: Answer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": "unsigned"})
    if answer.content or not answer.tool_calls:
        blocks.append({"type": "text", "text": answer.content})
    for call in answer.tool_calls:
        arguments = json.loads(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return blocks


def _usage(answer: Answer) -> dict[str, Any]:
    """Tokens; those of the prompt that were in the engine's cache count apart, as Anthropic's do."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer.sampled_tokens,
    }
