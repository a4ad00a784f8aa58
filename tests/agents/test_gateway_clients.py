"""OpenAI's and Anthropic's own clients: turns that go on, fork and stream; what is trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from fakes.agents import ScriptedEngine, log_prob, params, running_gateway

from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.session import Session
from rltrain.arguments.config import Config
from rltrain.sample import Sample

if TYPE_CHECKING:
    import openai  # a second, which the tests that do not ask it need not wait for

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = '<think>\nhm, then\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>'
QUESTION = {"role": "user", "content": "the 12 in an answer"}

Use = Callable[["openai.AsyncOpenAI", Session, ScriptedEngine], Awaitable[Any]]


@pytest.fixture
def talk(gateway_config: Config, parsers: Parsers) -> Callable[..., list[Sample]]:
    """Runs `use` in a session with OpenAI's client; returns the session's samples, which are checked."""

    import openai

    def run(use: Use, says: list[str], **limits: Any) -> list[Sample]:
        async def main() -> list[Sample]:
            async with (
                running_gateway(gateway_config, parsers) as (gateway, engine),
                gateway.open(Sample(index=7, prompt="task"), params(gateway_config), **limits) as session,
            ):
                engine.says = list(says)
                client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0)
                async with client:
                    await use(client, session, engine)
                return session.samples()

        samples = asyncio.run(main())
        for sample in samples:
            check(sample)
        return samples

    return run


def check(sample: Sample) -> None:
    """Every token that is trained has the log-prob that the engine gave it in this very place."""
    start = sample.prompt_length
    for i, (mask, value) in enumerate(
        zip(sample.loss_mask or [], sample.rollout_log_probs or [], strict=True)
    ):
        if mask:
            assert value == log_prob(sample.tokens[: start + i], sample.tokens[start + i])
    assert sample.rollout_id == 7


async def ask(client: openai.AsyncOpenAI, session: Session, messages: list[Any], **more: Any) -> Any:
    return await client.chat.completions.create(model=session.model, messages=messages, **more)


def test_a_tool_loop_is_one_sample_and_a_new_question_forks(talk: Any) -> None:
    """The template keeps reasoning within a tool loop, though the client leaves it out, and removes it afterwards."""

    async def use(client: openai.AsyncOpenAI, session: Session, engine: ScriptedEngine) -> None:
        messages: list[Any] = [QUESTION]
        answer = await ask(client, session, messages, tools=[ADD])
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.reasoning_content == "hm, then" and message.content is None
        call = message.tool_calls[0]
        assert call.function.name == "add" and call.function.arguments == '{"a": 1}'
        messages.append({"role": "assistant", "tool_calls": [call.model_dump()]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
        answer = await ask(client, session, messages, tools=[ADD])
        assert answer.choices[0].message.content == "the answer is 12"
        assert answer.usage.prompt_tokens == len(engine.requests[1]["input_ids"])
        assert (
            engine.requests[1]["input_ids"][: len(engine.requests[0]["input_ids"])]
            == (engine.requests[0]["input_ids"])
        )
        messages.append({"role": "assistant", "content": "the answer is 12"})
        messages.append({"role": "user", "content": "more"})
        await ask(client, session, messages, tools=[ADD])
        assert [turn.origin for turn in session.turns] == ["root", "append", "fork"]
        assert [turn.parent for turn in session.turns] == [None, 0, None]
        assert session.turns[2].forked_from == 1 and session.turns[0].tools == ["add"]

    first, second = talk(use, [CALL, "the answer is 12"])
    between = "\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert first.response == CALL + "<|im_end|>" + between + "the answer is 12<|im_end|>"
    assert second.response == "done<|im_end|>" and second.loss_mask == [1] * 5
    record = first.metadata["agent_session"]
    assert [turn["sample"] for turn in record["turns"]] == [0, 0, 1]
    assert [event["kind"] for event in record["events"]] == ["rewritten"]


def test_streams_choices_stop_words_and_lengths(talk: Any) -> None:
    async def use(client: openai.AsyncOpenAI, session: Session, engine: ScriptedEngine) -> None:
        async with client.chat.completions.stream(
            model=session.model, messages=[QUESTION], tools=[ADD], stream_options={"include_usage": True}
        ) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert {"chunk", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
        assert final.usage.completion_tokens == session.sampled_tokens
        two = await ask(client, session, [QUESTION], n=2)
        assert [choice.message.content for choice in two.choices] == ["first", "second"]
        cut = await ask(client, session, [QUESTION], max_tokens=3)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one", "length")
        stopped = await ask(client, session, [QUESTION], stop=["END"], temperature=0.3)
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("so ", "stop")
        assert engine.requests[-1]["sampling_params"]["temperature"] == 1.0
        events = [(event.kind, event.message) for event in session.record.events]
        assert events == [("not followed", "temperature=0.3: no effect, the run's own sampling applies")]
        assert [model.id async for model in client.models.list()] == [session.model]
        assert (await client.models.retrieve(session.model)).id == session.model

    samples = talk(use, [CALL, "first", "second", "one two", "so END and more"])
    assert len(samples) == 5  # all of one prompt
    assert samples[4].response == "so END" and samples[3].status is Sample.Status.TRUNCATED


def test_responses(talk: Any) -> None:
    tool = {"type": "function", "name": "add", "parameters": ADD["function"]["parameters"], "strict": True}

    async def use(client: openai.AsyncOpenAI, session: Session, engine: ScriptedEngine) -> None:
        given: list[Any] = [{"role": "user", "content": "the 12 in an answer"}]
        response = await client.responses.create(
            model=session.model, input=given, tools=[tool], instructions="be brief"
        )
        thought, call = response.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "hm, then")
        assert (call.type, call.name, call.arguments) == ("function_call", "add", '{"a": 1}')
        given += [item.model_dump() for item in response.output]
        given.append({"type": "function_call_output", "call_id": call.call_id, "output": "2"})
        async with client.responses.stream(
            model=session.model, input=given, tools=[tool], instructions="be brief"
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert final.output_text == "the answer is 12"
        assert final.usage.input_tokens == len(engine.requests[1]["input_ids"])
        # By the response's id, which the session keeps.
        more = await client.responses.create(
            model=session.model,
            input="more",
            previous_response_id=final.id,
            instructions="be brief",
            tools=[tool],
        )
        assert more.output_text == "done" and more.previous_response_id == final.id
        assert [turn.parent for turn in session.turns] == [
            None,
            0,
            None,
        ]  # the template removes the reasoning
        cut = await client.responses.create(model=session.model, input="x", max_output_tokens=2)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")

    talk(use, [CALL, "the answer is 12"])


async def run_tools(anthropic: Any, client: Any, session: Session, engine: ScriptedEngine) -> None:
    """Its own tool loop, which sends only what is new: the gateway holds the conversation."""

    async def add(a: int) -> str:
        """Adds one."""
        return str(a + 1)

    engine.says, before = [CALL, "the answer is 12"], len(session.turns)
    runner = client.beta.messages.tool_runner(
        model=session.model, max_tokens=100, tools=[anthropic.beta_async_tool(add)], system="be brief",
        messages=[{"role": "user", "content": "add 1"}],
    )  # fmt: skip
    assert [message.stop_reason async for message in runner] == ["tool_use", "end_turn"]
    first, second = session.turns[before:]
    assert (second.parent, second.origin) == (first.turn, "append")


@pytest.mark.slow
def test_anthropics_messages(gateway_config: Config, parsers: Parsers) -> None:
    anthropic = pytest.importorskip("anthropic")
    tool = {"name": "add", "description": "adds", "input_schema": ADD["function"]["parameters"]}

    async def main() -> list[Sample]:
        async with (
            running_gateway(gateway_config, parsers) as (gateway, engine),
            gateway.open(Sample(index=7, prompt="task"), params(gateway_config)) as session,
            anthropic.AsyncAnthropic(
                base_url=session.anthropic_base_url, api_key=session.api_key, max_retries=0
            ) as client,
        ):
            engine.says = [CALL, "the answer is 12"]
            messages: list[Any] = [{"role": "user", "content": "the 12 in an answer"}]
            more: Any = {"model": session.model, "max_tokens": 100, "tools": [tool], "system": "be brief"}
            count = await client.messages.count_tokens(
                model=session.model, messages=messages, system="be brief", tools=[tool]
            )
            answer = await client.messages.create(messages=messages, **more)
            thought, call = answer.content
            assert (thought.type, thought.thinking) == ("thinking", "hm, then")
            assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1})
            assert answer.stop_reason == "tool_use"
            assert count.input_tokens == len(engine.requests[0]["input_ids"])
            assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == count.input_tokens
            result = {
                "type": "tool_result",
                "tool_use_id": call.id,
                "content": [{"type": "text", "text": "2"}],
            }
            messages.append(
                {"role": "assistant", "content": [block.model_dump() for block in answer.content]}
            )
            messages.append({"role": "user", "content": [result]})
            async with client.messages.stream(messages=messages, **more) as stream:
                assert "".join([text async for text in stream.text_stream]) == "the answer is 12"
                final = await stream.get_final_message()
            assert final.stop_reason == "end_turn" and final.usage.output_tokens == 17
            assert [turn.parent for turn in session.turns] == [None, 0]
            engine.says = ["so END and more", CALL]
            stopped = await client.messages.create(messages=messages, stop_sequences=["END"], **more)
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "END")
            async with client.messages.stream(messages=messages, **more) as stream:
                final = await stream.get_final_message()
            assert final.content[1].input == {"a": 1} and final.content[0].thinking == "hm, then"
            assert [model.id async for model in client.models.list()] == [session.model]
            await run_tools(anthropic, client, session, engine)
            return session.samples()

    first, *_ = asyncio.run(main())
    check(first)
    assert first.loss_mask is not None and 0 in first.loss_mask and first.loss_mask[-1] == 1
