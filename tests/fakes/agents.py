"""Agents in the test's own process: a scripted engine behind a gateway, and a model that thinks and calls tools.

The tokenizer has several ways to write one text (some pairs of letters are tokens), and the template does what Qwen3's
does: it removes the reasoning of answers before the last question of the user.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import string
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from conftest import TOKEN
from fakes.engine_server import FakeEngine, fake_engine
from helpers.rollout import http_client
from helpers.tiny_model import make_model

from rltrain import arguments
from rltrain.agents.gateway.parsers import Parsers
from rltrain.agents.gateway.server import Gateway
from rltrain.agents.gateway.session import Session
from rltrain.arguments.config import Config
from rltrain.rollout.generate.single_turn import sampling_params
from rltrain.rollout.service.server import prepare
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample

USER = {"role": "user", "content": "12"}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}

Post = Callable[..., Awaitable[tuple[int, Any]]]

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("1", "2"), ("i", "n"), (":", " ")]
TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write {"name": <function-name>, "arguments": <args-json-object>} in <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages if message.role == 'user' %}{% set last.question = messages.index(message) %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'assistant' %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% else %}<|im_start|>assistant
{% if loop.index0 > last.question and message.reasoning_content %}<think>
{{ message.reasoning_content.strip() }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{% if message.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


def make_tokenizer(template: str = TEMPLATE) -> Any:
    """One token a character, a few for pairs of them, and Qwen3's tags."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = [each for each in string.printable if each not in "\r\x0b\x0c"]
    words = [*SPECIAL, "<unk>", *letters, *(a + b for a, b in MERGES)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    tokenizer.add_tokens([AddedToken(each, special=False) for each in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def make_agent_model(directory: Path, *, weights: bool = False) -> Path:
    """A tiny Qwen3 with that tokenizer."""
    tokenizer = make_tokenizer()
    return make_model(directory, weights=weights, tokenizer=tokenizer, vocab_size=128, context=4096)


def agent_config(model: Path, directory: Path, *more: str) -> Config:
    """The configuration as the rollout process prepares it."""
    flags = ["--hf-checkpoint", str(model), "--prompt-data", str(directory / "prompts.jsonl")]
    flags += ["--rollout-batch-size", "1", "--num-rollout", "1", "--agent-gateway"]
    flags += [] if "--environment" in more else ["--rm-type", "math"]
    flags += ["--sglang-reasoning-parser", "qwen3", "--sglang-tool-call-parser", "qwen25"]
    (directory / "prompts.jsonl").write_text('{"input": "x"}\n')
    return prepare(arguments.parse([*flags, *more]), RunLayout(directory))


def log_prob(prefix: list[int], token: int) -> float:
    """What the scripted engine says: of the token and of everything before it, so that no other place has it."""
    digest = hashlib.blake2b(repr((prefix, token)).encode(), digest_size=4).digest()
    return -int.from_bytes(digest, "big") / 2**32


class ScriptedEngine(FakeEngine):
    """Answers with the texts in `says`, one a request, then with "done"; ids are tokenised letter by letter."""

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self.tokenizer = make_tokenizer()
        self.says: list[str] = []
        self.version = "3"
        self.open = asyncio.Event()  # answers wait while it is not set
        self.open.set()

    async def before_answer(self, body: dict[str, Any]) -> None:
        await self.open.wait()

    def answer(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        text = self.says.pop(0) if self.says else "done"
        stop = next((word for word in body["sampling_params"].get("stop") or () if word in text), None)
        if stop:
            text = text[: text.index(stop) + len(stop)]
        ids = spell(self.tokenizer, text) + ([] if stop else [self.tokenizer.eos_token_id])
        room = body["sampling_params"]["max_new_tokens"]
        reason: dict[str, Any] = {"type": "stop", "matched": stop or self.tokenizer.eos_token_id}
        if len(ids) > room:
            ids, reason = ids[:room], {"type": "length", "length": room}
        if aborted:
            ids, reason = [], {"type": "abort", "message": "stopped"}
        before = list(body["input_ids"])
        return {
            "text": text,
            "output_ids": ids,
            "meta_info": {
                "finish_reason": reason,
                "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
                "cached_tokens": len(before) // 2,
                "prompt_tokens": len(before),
                "completion_tokens": len(ids),
                "e2e_latency": 0.001,
                "output_token_logprobs": [
                    [log_prob(before + ids[:i], token), token, None] for i, token in enumerate(ids)
                ],
            },
        }


def spell(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, letter by letter, as a model may write it: not as the tokenizer would."""
    ids: list[int] = []
    while text:
        tag = next((each for each in TAGS if text.startswith(each)), text[0])
        ids.append(tokenizer.convert_tokens_to_ids(tag))
        text = text[len(tag) :]
    return ids


@asynccontextmanager
async def running_gateway(
    config: Config, parsers: Any = None
) -> AsyncIterator[tuple[Gateway, ScriptedEngine]]:
    """A gateway of this configuration with a scripted engine."""
    async with (
        fake_engine(TOKEN, ScriptedEngine) as engine,
        http_client(config, engine.url),
        Gateway(config, "127.0.0.1", parsers) as gateway,
    ):
        yield gateway, engine


def params(config: Config) -> dict[str, Any]:
    """The run's sampling parameters."""
    return sampling_params(config.rollout)


def serve(
    config: Config,
    parsers: Parsers,
    use: Callable[[Session, Post, ScriptedEngine, Gateway], Awaitable[Any]],
    **limits: Any,
) -> list[Sample]:
    """Run `use` with a session and a plain HTTP client; the session's samples."""

    async def main() -> list[Sample]:
        async with (
            running_gateway(config, parsers) as (gateway, engine),
            gateway.open(Sample(index=1, prompt="task"), params(config), **limits) as session,
            aiohttp.ClientSession() as client,
        ):

            async def post(path: str, body: Any, key: str | None = session.api_key) -> tuple[int, Any]:
                data = (
                    body if isinstance(body, bytes) else json.dumps({"model": session.model, **body}).encode()
                )
                headers = {} if key is None else {"Authorization": f"Bearer {key}"}
                url = session.anthropic_base_url + path
                async with client.post(url, data=data, headers=headers) as response:
                    return response.status, json.loads(await response.read())

            await use(session, post, engine, gateway)
            return session.samples()

    return asyncio.run(main())
