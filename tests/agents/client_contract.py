"""What OpenAI's and Anthropic's newest clients do with a gateway: an agent that has these packages and nothing else.

A program of its own, because SGLang pins an older openai; test_gateway_newest.py runs it, and says what the model says.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic
import openai
import pydantic

MODEL = json.loads(sys.stdin.readline())["model"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
QUESTION: Any = [{"role": "user", "content": "the 12 in an answer"}]
FUNCTION: Any = {"name": "add", "description": "Adds one.", "parameters": SCHEMA, "strict": True}


class Sum(pydantic.BaseModel):
    """An answer in a form."""

    total: int


def chat(client: Any) -> None:
    """Chat Completions: a tool loop, a stream, a form, log-probs, choices."""
    asked: Any = {"model": MODEL, "tools": [{"type": "function", "function": FUNCTION}]}
    message = client.chat.completions.create(messages=QUESTION, **asked).choices[0].message
    assert message.tool_calls[0].function.arguments == '{"a": 1}', message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    messages = [*QUESTION, message, result]
    with client.chat.completions.stream(
        messages=messages, stream_options={"include_usage": True}, **asked
    ) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds, kinds
    assert done.choices[0].message.content == "the answer is 12" and done.usage.total_tokens > 100
    form = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Sum)
    assert form.choices[0].message.parsed == Sum(total=12)
    two = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, logprobs=True)
    assert [each.message.content for each in two.choices] == ["first", "second"]
    assert all(each.logprobs.content[0].logprob <= 0 for each in two.choices)
    parts = list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, stop=["END"]))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "so "


def responses(client: Any) -> None:
    """Responses: a tool loop by the response's id, streamed; a form."""
    tools: Any = [{"type": "function", **FUNCTION}]
    first = client.responses.create(model=MODEL, input=QUESTION, tools=tools, instructions="be brief")
    call = first.output[-1]
    assert (call.type, call.name, call.arguments) == ("function_call", "add", '{"a": 1}'), first
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "2"}]
    with client.responses.stream(
        model=MODEL, input=result, tools=tools, instructions="be brief", previous_response_id=first.id
    ) as stream:
        kinds = [event.type for event in stream]
        done = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed"), kinds
    assert done.output_text == "the answer is 12"
    form = client.responses.parse(model=MODEL, input=QUESTION, text_format=Sum)
    assert form.output_parsed == Sum(total=12)


def messages(client: Any) -> None:
    """Messages: a tool loop, streamed; the package's own loop; counting."""
    asked: Any = {"model": MODEL, "max_tokens": 99}
    asked |= {"tools": [{"name": "add", "description": "Adds one.", "input_schema": SCHEMA}]}
    first = client.messages.create(messages=QUESTION, **asked)
    assert (first.stop_reason, first.content[-1].input) == ("tool_use", {"a": 1}), first
    result = [{"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "2"}]
    more = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": result}]
    with client.messages.stream(messages=more, **asked) as stream:
        assert "".join(stream.text_stream) == "the answer is 12"
        assert stream.get_final_message().stop_reason == "end_turn"
    assert client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens > 10

    def add(a: int) -> str:
        """Adds one."""
        return str(a + 1)

    tool: Any = anthropic.beta_tool(add)
    loop = client.beta.messages.tool_runner(model=MODEL, max_tokens=99, tools=[tool], messages=QUESTION)
    assert [message.stop_reason for message in loop] == ["tool_use", "end_turn"]


def errors(ours: Any, theirs: Any) -> None:
    """Each is an exception of the client's own."""
    for call, kind in (
        (lambda: ours.chat.completions.create(model="gpt-5", messages=QUESTION), openai.NotFoundError),
        (lambda: ours.chat.completions.create(model=MODEL, messages=[]), openai.BadRequestError),
        (lambda: ours.responses.create(model=MODEL, input="x", background=True), openai.BadRequestError),
        (lambda: ours.with_options(api_key="sk-x").models.list(), openai.AuthenticationError),
        (
            lambda: theirs.messages.create(model="claude", max_tokens=9, messages=QUESTION),
            anthropic.NotFoundError,
        ),
        (lambda: theirs.with_options(api_key="sk-x").models.list(), anthropic.AuthenticationError),
    ):
        try:
            call()
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")
    assert [model.id for model in ours.models.list()] == [MODEL]
    assert [model.id for model in theirs.models.list()] == [MODEL]


def main() -> None:
    """All of it; where the gateway is stands in the environment, as for any agent."""
    with openai.OpenAI(max_retries=0) as ours, anthropic.Anthropic(max_retries=0) as theirs:
        chat(ours)
        responses(ours)
        messages(theirs)
        errors(ours, theirs)
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}")


if __name__ == "__main__":
    main()
