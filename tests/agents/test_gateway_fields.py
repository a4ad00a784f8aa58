"""Each field of a request to the gateway acts, is refused, or is in the session's record as without effect."""

from __future__ import annotations

from typing import Any

from fakes.agents import PATHS, USER, Post, ScriptedEngine, serve

from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.server import Gateway
from rltrain.agents.gateway.session import Session
from rltrain.arguments.config import Config

# A request's fields, and those of them that the session's record names as without effect.
FIELDS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("chat", {"temperature": 0, "top_p": 0.5, "seed": 3, "logit_bias": {"5": 1}},
     {"temperature=0:", "top_p=0.5:", "seed=3:", "logit_bias={'5': 1}:"}),
    ("chat", {"parallel_tool_calls": False, "tool_choice": "required", "response_format": {"type": "json_object"}},
     {"parallel_tool_calls=False:", "tool_choice='required':", "response_format='json_object':"}),
    ("chat", {"reasoning_effort": "high"}, {"reasoning_effort='high': the model's chat template does not know it"}),
    ("chat", {"reasoning_effort": "none"}, set()),
    ("chat", {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "foo": None}, set()),
    ("chat", {"n": 1, "presence_penalty": None, "parallel_tool_calls": True, "tool_choice": "auto"}, set()),
    ("responses", {"temperature": 0.0, "truncation": "auto", "text": {"verbosity": "low"}},
     {"temperature=0.0:", "truncation='auto':", "text.verbosity='low':"}),
    ("responses", {"include": ["reasoning.encrypted_content"], "store": False, "truncation": "disabled"}, set()),
    ("messages", {"max_tokens": 9, "top_k": 5, "thinking": {"type": "enabled", "budget_tokens": 2000}},
     {"top_k=5:", "thinking.budget_tokens=2000:"}),
    ("messages", {"max_tokens": 9, "output_config": {"effort": "low"}, "tool_choice": {"type": "any"}},
     {"reasoning_effort='low':", "tool_choice='any':"}),
    ("messages", {"max_tokens": 9, "metadata": {"user_id": "u"}, "cache_control": {"type": "ephemeral"}}, set()),
]  # fmt: skip


def test_a_field_acts_is_refused_or_is_in_the_record(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        for protocol, fields, noted in FIELDS:
            session.record.events.clear()
            asked = {"input": "12"} if protocol == "responses" else {"messages": [USER]}
            status, answer = await post(PATHS[protocol], {**asked, **fields})
            assert status == 200, answer
            events = {event.message for event in session.record.events}
            assert len(events) == len(noted), (fields, events)
            assert all(any(each.startswith(note) for each in events) for note in noted), (fields, events)
            assert engine.requests[-1]["sampling_params"]["temperature"] == 1.0

    serve(gateway_config, parsers, use)


def test_thinking_is_switched_off_by_name(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        for protocol, asked in (("chat", {"messages": [USER]}), ("responses", {"input": "12"})):
            for thinks in (False, True):
                await post(PATHS[protocol], {**asked, "enable_thinking": thinks})
                prompt = engine.tokenizer.decode(engine.requests[-1]["input_ids"])
                assert prompt.endswith("</think>\n\n") is not thinks
        status, _ = await post(PATHS["chat"], {"messages": [USER], "enable_thinking": "no"})
        assert status == 400 and session.record.events == []

    serve(gateway_config, parsers, use)


def test_log_probs_are_those_of_the_sampled_tokens(gateway_config: Config, parsers: Parsers) -> None:
    async def use(session: Session, post: Post, engine: ScriptedEngine, gateway: Gateway) -> None:
        _, answer = await post(PATHS["chat"], {"messages": [USER], "logprobs": True})
        entries = answer["choices"][0]["logprobs"]["content"]
        (turn,) = session.trajectory.turns.values()
        assert [entry["logprob"] for entry in entries] == list(turn.sampled.log_probs)
        assert "".join(entry["token"] for entry in entries) == "done<|im_end|>"
        assert bytes(entries[0]["bytes"]) == b"d"
        _, answer = await post(PATHS["chat"], {"messages": [USER]})
        assert answer["choices"][0]["logprobs"] is None

    serve(gateway_config, parsers, use)
