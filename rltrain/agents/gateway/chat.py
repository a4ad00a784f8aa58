"""OpenAI's Chat Completions: https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rltrain.agents.gateway.exchange import (
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

API = "chat"
# Fields that take effect; sampling fields, which the run overrides because it trains on the log-probs; and fields meant
# for the provider (names of callers, storage, caches).
_ACTS = (
    "messages", "model", "stop", "n", "max_tokens", "max_completion_tokens", "stream", "stream_options", "tools",
    "logprobs", "reasoning_effort", "chat_template_kwargs", "enable_thinking",
)  # fmt: skip
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "logit_bias", "seed", "min_tokens", "ignore_eos", "stop_token_ids", "verbosity", "moderation", "thinking",
)  # fmt: skip
HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", "modalities",
)  # fmt: skip
_REFUSED = {
    "functions": ": give tools",
    "function_call": ": give tools",
    "audio": "",
    "web_search_options": "",
    "top_logprobs": ": logprobs returns the log-probs of the sampled tokens",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FINISH = {"stop_word": "stop"}


def read(body: Mapping[str, Any]) -> Ask:
    """The request.

    Raises:
        ApiError: something in it is wrong.
    """
    messages = take(body, "messages", list)
    if not messages:
        raise bad("messages is missing or empty", "messages")
    refuse(body, _REFUSED)
    if [kind for kind in take(body, "modalities", list, []) if kind != "text"]:
        raise bad("modalities: the model writes text only", "modalities")
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else take(body, "stop", list, [])
    if not all(isinstance(word, str) and word for word in words):
        raise bad(f"stop is {stop!r:.80}; expected a text or a list of texts", "stop")
    tools = take(body, "tools", list)
    choice = body.get("tool_choice")
    return Ask(
        api=API,
        messages=[read_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        tools=None if choice == "none" else read_tools(tools),
        n=count(body, "n", 1) or 1,
        max_tokens=count(body, "max_completion_tokens", count(body, "max_tokens")),
        stop=tuple(words),
        stream=take(body, "stream", bool, False),
        template_kwargs=template_kwargs(body, body.get("reasoning_effort")),
        not_followed=not_followed(body, (*_ACTS, *_REFUSED), choice, body.get("response_format")),
        log_probs=take(body, "logprobs", bool, False),
    )


def read_message(message: Any, where: str) -> Message:
    """A message as a chat template takes it."""
    if not isinstance(message, dict):
        raise bad(f"{where} is {message!r:.80}; expected an object", where)
    role = message.get("role")
    if role not in _ROLES:
        raise bad(f"{where}.role is {role!r:.80}; expected one of {', '.join(_ROLES)}", f"{where}.role")
    refuse(message, {"function_call": ": give tool_calls", "audio": ""})
    content = text_of(message.get("content"), f"{where}.content", ("text", "refusal"))
    read: Message = {"role": {"developer": "system", "function": "tool"}.get(role, role), "content": content}
    if role == "assistant":
        if reasoning := take(message, "reasoning_content", str) or take(message, "reasoning", str):
            read["reasoning_content"] = reasoning
        if calls := take(message, "tool_calls", list):
            read["tool_calls"] = [
                _read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
            ]
    if role == "tool":
        read["tool_call_id"] = take(message, "tool_call_id", str, "")
    return read


def read_tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The functions that the model may call; None for none."""
    for i, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(f'tools[{i}] is not {{"type": "function", "function": {{"name": …}}}}', f"tools[{i}]")
    return tools or None


def template_kwargs(body: Mapping[str, Any], effort: Any) -> dict[str, Any]:
    """What the request says to the chat template: `chat_template_kwargs`, and whether and how much to think."""
    kwargs = dict(take(body, "chat_template_kwargs", dict, {}))
    if (thinks := take(body, "enable_thinking", bool)) is not None:
        kwargs.setdefault("enable_thinking", thinks)
    if isinstance(effort, str):
        kwargs.setdefault("reasoning_effort", effort)
        if effort == "none":
            kwargs.setdefault("enable_thinking", False)
    return kwargs


def not_followed(body: Mapping[str, Any], known: Collection[str], choice: Any, form: Any) -> dict[str, Any]:
    """What the request asks of sampling, where the run's own settings hold.

    Raises:
        ApiError: it has an unknown field, or a `tool_choice` that does not exist.
    """
    known = (*known, *HARMLESS, "tool_choice", "response_format", "parallel_tool_calls")
    asked = left_over(body, known, SAMPLING)
    if body.get("parallel_tool_calls") is False:
        asked["parallel_tool_calls"] = False
    if not (choice in (None, "auto", "none", "required") or isinstance(choice, dict)):
        raise bad(f"tool_choice is {choice!r:.80}; expected none, auto, required or a tool", "tool_choice")
    if choice not in (None, "auto", "none"):
        asked["tool_choice"] = choice
    if isinstance(form, dict) and form.get("type") != "text":
        asked["response_format"] = form.get("type")
    return asked


def write(answers: Sequence[Answer], model: str, ask: Ask, name: str) -> dict[str, Any]:
    """The response; `name` is its id."""
    choices = [
        {
            "index": i,
            "message": _message(answer),
            "finish_reason": _finish(answer),
            "logprobs": _log_probs(answer, ask),
        }
        for i, answer in enumerate(answers)
    ]
    return {**_head("chat.completion", name, model), "choices": choices, "usage": usage(answers)}


def events(
    answers: Sequence[Answer], model: str, ask: Ask, name: str, options: Any
) -> Iterator[tuple[str | None, Any]]:
    """The same in parts, as pairs of an event's name (none here) and its data."""
    head = _head("chat.completion.chunk", name, model)

    def part(
        i: int, delta: dict[str, Any], finish: str | None = None, log_probs: Any = None
    ) -> tuple[None, dict[str, Any]]:
        choice = {"index": i, "delta": delta, "finish_reason": finish, "logprobs": log_probs}
        return None, {**head, "choices": [choice]}

    for i, answer in enumerate(answers):
        yield part(i, {"role": "assistant", "content": ""})
        if answer.reasoning:
            yield part(i, {"reasoning_content": answer.reasoning})
        if answer.content:
            yield part(i, {"content": answer.content})
        for k, call in enumerate(_calls(answer)):
            opened = {**call, "function": {**call["function"], "arguments": ""}}
            yield part(i, {"tool_calls": [{"index": k, **opened}]})
            arguments = {"arguments": call["function"]["arguments"]}
            yield part(i, {"tool_calls": [{"index": k, "function": arguments}]})
        yield part(i, {}, _finish(answer), _log_probs(answer, ask))
    if isinstance(options, dict) and options.get("include_usage"):
        yield None, {**head, "choices": [], "usage": usage(answers)}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = {401: "authentication_error", 403: "permission_error"}.get(error.status)
    kind = kind or ("server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens; the prompt counts once."""
    prompt, sampled = answers[0].prompt_tokens, sum(answer.sampled_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": min(answer.cached_tokens for answer in answers)},
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning_tokens for each in answers)},
    }


def models(model: str) -> dict[str, Any]:
    """The list of models: the one that is trained. Anthropic's clients read it too."""
    return {
        "object": "list", "data": [model_card(model)], "has_more": False, "first_id": model, "last_id": model
    }  # fmt: skip


def model_card(model: str) -> dict[str, Any]:
    """One entry of the list."""
    ours = {"id": model, "object": "model", "created": 0, "owned_by": "slurmlime"}
    return {**ours, "type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(f"{where} is not a call of a function", where)
    arguments = arguments_of(function.get("arguments", "{}"), f"{where}.function.arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _head(kind: str, name: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{name}", "object": kind, "created": int(time.time()), "model": model}


def _message(answer: Answer) -> dict[str, Any]:
    calls = _calls(answer)
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if calls else "")}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _log_probs(answer: Answer, ask: Ask) -> dict[str, Any] | None:
    """Of all tokens of the response, in the order in which they were sampled: reasoning and calls are among them."""
    if not ask.log_probs:
        return None
    entries = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in answer.log_probs
    ]
    return {"content": entries, "refusal": None}


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.tool_calls
    ]


def _finish(answer: Answer) -> str:
    return _FINISH.get(answer.finish, answer.finish)
