"""What goes wrong between agent and gateway: an error in the protocol's own form, a record, and the run goes on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import aiohttp
import pytest
from fakes.agents import (
    PATHS,
    USER,
    Post,
    ScriptedEngine,
    log_prob,
    params,
    serve,
)
from helpers.local_job import wait_until_async
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.agents.gateway import chat, server
from rltrain.agents.gateway.exchange import Ask
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.prompts import Conversations
from rltrain.agents.gateway.server import Gateway
from rltrain.agents.gateway.session import Session
from rltrain.agents.gateway.turnstile import AT_ONCE
from rltrain.arguments.config import Config
from rltrain.sample import Sample

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


BAD: list[tuple[str, Any, int, str]] = [
    ("chat", b"{not json", 400, "not JSON"),
    ("chat", b"[1]", 400, "not a JSON object"),
    ("chat", b"\xff\x00\x9d{}", 400, "not JSON"),
    ("chat", b"[" * 100_000, 400, "not JSON"),
    ("chat", {"messages": [USER], "model": "gpt-5"}, 404, "no model 'gpt-5'"),
    ("chat", {}, 400, "messages is missing"),
    ("chat", {"messages": "hello"}, 400, "expected a list"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
    ("chat", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "the model takes text only"),
    ("chat", {"messages": [USER], "n": 0}, 400, "at least 1"),
    ("chat", {"messages": [USER], "n": 1000}, 400, "at most 128"),
    ("chat", {"messages": [USER], "max_tokens": "many"}, 400, "whole number"),
    ("chat", {"messages": [USER], "stop": [1]}, 400, "stop"),
    ("chat", {"messages": [USER], "tools": [{"type": "web"}]}, 400, "tools[0]"),
    ("chat", {"messages": [{"role": "user", "content": "x" * (10 << 20)}]}, 400, "leaves no room"),
    ("chat", {"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "leaves no room"),
    ("chat", b" " * (33 << 20), 413, "exceeded"),
    ("chat", {"messages": [USER], "functions": [{"name": "add"}]}, 400, "give tools"),
    ("chat", {"messages": [{"role": "assistant", "function_call": {"name": "add"}}]}, 400, "give tool_calls"),
    ("chat", {"messages": [USER], "modalities": ["text", "audio"]}, 400, "text only"),
    ("chat", {"messages": [USER], "web_search_options": {"a": 1}}, 400, "web_search_options"),
    ("chat", {"messages": [USER], "logprobs": True, "top_logprobs": 3}, 400, "top_logprobs"),
    ("chat", {"messages": [USER], "tool_choice": "sometimes"}, 400, "tool_choice"),
    ("chat", {"messages": [USER], "guided_json": {"type": "object"}}, 400, "guided_json can't be used here"),
    ("responses", {"input": "x", "background": True}, 400, "background"),
    ("responses", {"input": "x", "conversation": "conv_1"}, 400, "give previous_response_id"),
    ("responses", {"input": "x", "include": ["message.output_text.logprobs"]}, 400, "include"),
    ("responses", {"input": "x", "stop": ["END"]}, 400, "stop can't be used here"),
    ("responses", {"input": "x", "n": 2}, 400, "n can't be used here"),
    ("messages", {"messages": [USER], "max_tokens": 5, "mcp_servers": [{}]}, 400, "mcp_servers"),
    ("messages", {"messages": [USER], "max_tokens": 5, "tool_choice": {"type": "all"}}, 400, "tool_choice"),
    ("messages", {"messages": [USER], "max_tokens": 5, "compaction": {"a": 1}}, 400, "compaction"),
    ("messages", {"messages": [USER], "max_tokens": 5, "thread": {"type": "go"}}, 400, "thread"),
    ("responses", {}, 400, "input is missing"),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "text only"),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "item_reference"),
    ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, 400, "web_search"),
    ("responses", {"input": "x", "previous_response_id": "resp_none"}, 404, "resp_none"),
    ("messages", {"messages": [USER]}, 400, "max_tokens is missing"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5}, 400, "text only"),
    ("messages", {"messages": [USER], "max_tokens": 5, "tools": [{"name": "x"}]}, 400, "input_schema"),
    ("messages", {"messages": [USER], "max_tokens": 5, "model": "claude"}, 404, "no model 'claude'"),
]  # fmt: skip


def test_each_request_that_cannot_be_right_is_answered_in_the_protocols_form(
    gateway_config: Config, parsers: Parsers
) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        for protocol, body, status, message in BAD:
            got, answer = await post(PATHS[protocol], body)
            assert (got, message in answer["error"]["message"]) == (status, True), (body, answer)
            assert ("param" in answer["error"]) == (protocol != "messages")
            assert answer.get("type") == ("error" if protocol == "messages" else None)
        assert (await post("/v1/nothing", {}))[0] == 404
        assert not engine.requests and not session.turns
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200  # and it goes on

    assert len(serve(gateway_config, parsers, use)) == 1


def test_an_unknown_thread_is_told_as_anthropics_client_takes_it(
    gateway_config: Config, parsers: Parsers
) -> None:
    """At this code its tool runner sends the whole conversation again."""

    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        thread = {"type": "continue", "previous_message_id": "msg_none"}
        body = {"messages": [USER], "max_tokens": 5, "thread": thread}
        status, answer = await post(PATHS["messages"], body)
        assert (status, answer["error"]["details"]) == (404, {"error_code": "thread_not_found"})
        status, answer = await post(PATHS["messages"], {**body, "system": "be brief"})
        assert status == 400 and "created with" in answer["error"]["message"]

    assert serve(gateway_config, parsers, use) == []


def test_only_a_sessions_own_key_is_answered_and_it_ends_with_it(
    gateway_config: Config, parsers: Parsers
) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        body = {"messages": [USER], "max_tokens": 5}
        async with gateway.open(Sample(index=2), params(gateway_config)) as other:
            for key in (None, "", "sk-guess", other.api_key):
                for path in (*PATHS.values(), "/v1/nothing"):
                    status, answer = await post(path, body, key)
                    assert status == 401 and "key" in answer["error"]["message"]
            assert gateway.session_count == 2
            url, key = other.base_url + "/models", other.api_key
        assert gateway.session_count == 1
        async with (
            aiohttp.ClientSession() as client,
            client.get(url, headers={"x-api-key": key}) as response,
        ):
            assert response.status == 401  # of a session that has ended
        assert not engine.requests
        assert session.api_key not in json.dumps(session.record.as_json(session.id))

    assert serve(gateway_config, parsers, use) == []  # nothing was sampled


def test_limits_are_refused_for_good(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        engine.says = ["many words", "many words", "many words"]
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200
        assert (await post(PATHS["chat"], {"messages": [USER], "n": 5}))[0] == 403  # four turns
        status, answer = await post(PATHS["messages"], {"messages": [USER], "max_tokens": 50})
        assert status == 200 and answer["stop_reason"] == "max_tokens"  # what was left of 16 tokens
        status, answer = await post(PATHS["messages"], {"messages": [USER], "max_tokens": 50})
        assert (status, answer["error"]["type"]) == (403, "permission_error")
        assert {event.kind for event in session.record.events} == {"limit"}
        assert session.sampled_tokens == 16

    assert len(serve(gateway_config, parsers, use, max_turns=4, max_tokens=16)) == 2


def test_a_tool_call_that_does_not_parse_is_shown_as_it_was_written(
    gateway_config: Config, parsers: Parsers
) -> None:
    broken = '<tool_call>\n{"name": "add", "arguments": {"a":\n</tool_call>'

    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        engine.says = [broken, '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>']
        for _ in range(2):
            _, answer = await post(PATHS["chat"], {"messages": [USER], "tools": TOOLS})
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["choices"][0]["message"]["content"].startswith("<tool_call>")
        assert [event.kind for event in session.record.events] == ["unparsed", "unparsed"]

    first, _ = serve(gateway_config, parsers, use)
    assert broken in first.response and first.metadata["agent_session"]["events"][0]["kind"] == "unparsed"


def test_a_history_that_never_was_is_not_trained(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        invented = [
            USER,
            {"role": "assistant", "content": "never said"},
            {"role": "tool", "content": "nor this"},
        ]
        assert (await post(PATHS["chat"], {"messages": invented}))[0] == 200

    (sample,) = serve(gateway_config, parsers, use)
    assert sample.response == "done<|im_end|>" and sample.loss_mask == [1] * 5


def test_a_client_that_leaves_is_not_trained_on(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        engine.open.clear()
        for stream in (False, True):
            session.record.events.clear()
            body = {"messages": [USER], "stream": stream}
            asking = asyncio.ensure_future(post(PATHS["chat"], body))
            await wait_until_async(lambda asked=1 + stream: len(engine.requests) >= asked)
            asking.cancel()
            await wait_until_async(lambda: session.record.events)
        engine.open.set()
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200
        assert [event.kind for event in session.record.events] == ["disconnected"]

    assert len(serve(gateway_config, parsers, use)) == 1


def test_a_client_that_leaves_in_the_middle_of_a_stream(
    gateway_config: Config, parsers: Parsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_PATIENCE", 0.02)

    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        engine.open.clear()
        body = {"model": session.model, "messages": [USER], "stream": True}
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.api_key}"}) as client:
            response = await client.post(f"{session.base_url}/chat/completions", json=body)
            assert (response.status, await response.content.readline()) == (200, b": ping\n")
            response.close()
            await wait_until_async(lambda: session.record.events)
        engine.open.set()
        assert [event.kind for event in session.record.events] == ["disconnected"] and not session.turns
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200

    assert len(serve(gateway_config, parsers, use)) == 1


def test_a_hundred_conversations_of_one_agent_at_once(
    gateway_config: Config, parsers: Parsers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is answered and trained, and they do not hold up the event loop all together."""
    rounds, seen = 0, []
    prompt = Conversations.prompt

    def noted(self: Conversations, ask: Ask, tokens: Any) -> Any:
        seen.append(rounds)
        return prompt(self, ask, tokens)

    async def count_rounds() -> None:
        nonlocal rounds
        while True:
            await asyncio.sleep(0)
            rounds += 1

    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        bodies = [{"messages": [{"role": "user", "content": f"number {i}"}]} for i in range(100)]
        answers = await asyncio.gather(*(post(PATHS["chat"], body) for body in bodies))
        assert [status for status, _ in answers] == [200] * 100
        monkeypatch.setattr(Conversations, "prompt", noted)
        counting = asyncio.create_task(count_rounds())
        await asyncio.gather(*(session.ask(chat.read(body)) for body in bodies[:50]))
        counting.cancel()
        assert max(Counter(seen).values()) == AT_ONCE, seen

    samples = serve(gateway_config, parsers, use)
    assert len(samples) == 150 and all(sample.loss_mask == [1] * 5 for sample in samples)


def test_a_rollout_that_is_stopped_starts_over(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200
        engine.answer = lambda body, aborted: ScriptedEngine.answer(engine, body, aborted=True)  # type: ignore[method-assign]
        for _ in range(2):
            assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 403
        assert session.aborted and len(engine.requests) == 2

    (sample,) = serve(gateway_config, parsers, use)
    assert (sample.status, sample.response_length) == (Sample.Status.ABORTED, 0)


def test_an_engines_fault_is_told_and_kept_apart_from_the_agents(
    gateway_config: Config, parsers: Parsers
) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        engine.faults = [400, 503]  # the second is tried again by the gateway itself
        status, answer = await post(PATHS["messages"], {"messages": [USER], "max_tokens": 9})
        assert (status, answer["error"]["type"]) == (503, "overloaded_error")
        assert session.fault is not None and "made-up fault" in session.fault
        assert (await post(PATHS["chat"], {"messages": [USER]}))[0] == 200

    assert len(serve(gateway_config, parsers, use)) == 1


# What an agent does with its conversation before it asks: goes on with a question or a tool's result, asks again, edits
# an answer, forgets the beginning, begins another one; and leaves out the reasoning, or not.
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["question", "result", "again", "edit", "compact", "other"]),
        st.sampled_from(
            ["the", "12 in", "<think>\nhm: then\n</think>\n\nan answer", "<think>\nx\n</think>\n\n"]
        ),
        st.booleans(),
        st.none() | st.integers(1, 4),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=15, deadline=None)
@given(MOVES)
def test_any_conversation_is_trained_on_what_was_sampled_once(
    gateway_config: Config, parsers: Parsers, moves: list[Any]
) -> None:
    sampled: list[tuple[tuple[int, ...], int]] = []

    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        messages: list[Any] = [USER]
        for move, says, keeps_reasoning, max_tokens in moves:
            if move == "edit" and len(messages) > 1:
                messages[1] = {"role": "assistant", "content": "edited"}
            if move == "compact":
                messages = [{"role": "system", "content": "so far: 12"}, *messages[-1:]]
            if move == "other":
                messages = [{"role": "user", "content": "another"}]
            if move in ("question", "result"):
                messages = [
                    *messages,
                    {"role": "user" if move == "question" else "tool", "content": "the 12"},
                ]
            engine.says = [says]
            status, answer = await post(PATHS["chat"], {"messages": messages, "max_tokens": max_tokens})
            assert status == 200
            message = answer["choices"][0]["message"]
            if not keeps_reasoning:
                message.pop("reasoning_content", None)
            if move != "again":
                messages = [*messages, message]
        for request, turn in zip(engine.requests, session.trajectory.turns.values(), strict=True):
            ids = list(request["input_ids"])
            for token in turn.sampled.tokens:
                sampled.append((tuple(ids), token))
                ids.append(token)

    trained = []
    for sample in serve(gateway_config, parsers, use):
        for i, mask in enumerate(sample.loss_mask or []):
            at = sample.prompt_length + i
            if mask:
                prefix = sample.tokens[:at]
                assert (sample.rollout_log_probs or [])[i] == log_prob(prefix, sample.tokens[at])
                trained.append((tuple(prefix), sample.tokens[at]))
    assert sorted(trained) == sorted(sampled)
