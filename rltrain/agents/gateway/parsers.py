"""Reasoning and tool calls in what a model wrote, found by SGLang's own parsers for the model's family.

`--sglang-reasoning-parser` and `--sglang-tool-call-parser` name them; without, SGLang's rules choose by chat template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rltrain.agents.gateway.exchange import bad
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Parsed:
    """A response in its parts.

    Attributes:
        calls: pairs of a tool's name and its arguments, a JSON object as text.
        unparsed: the model began a tool call that is not one; it is in `content` as it was written.
    """

    content: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    unparsed: bool = False


class Parsers:
    """The parsers of one model.

    Attributes:
        reasoning, tool_calls: names of SGLang's parsers; None: the family has none.
        missing: why SGLang can't be imported here; None: it can.
    """

    def __init__(self, tokenizer: Any, sglang: dict[str, Any]) -> None:
        """Choose the parsers; takes seconds, in which SGLang is imported.

        Args:
            tokenizer: with the model's chat template.
            sglang: the engines' flags.

        Raises:
            UserError: a flag names a parser, and SGLang can't be imported.
        """
        self.reasoning, self.tool_calls = sglang.get("reasoning_parser"), sglang.get("tool_call_parser")
        self.missing = _import_sglang()
        if self.missing is None:
            self._detect(tokenizer, sglang.get("chat_template") or tokenizer.chat_template)
        elif self.reasoning or self.tool_calls:
            raise UserError(
                "--sglang-reasoning-parser and --sglang-tool-call-parser need SGLang in the environment of the rollout"
                f" process, and it can't be imported there: {self.missing}"
            )

    def _detect(self, tokenizer: Any, template: Any) -> None:
        from sglang.srt.parser import template_detection as rules

        opened, toggle = rules.detect_reasoning_pattern(template)
        if self.reasoning in (None, "auto"):
            self.reasoning = rules.detect_reasoning_parser(template, tokenizer, toggle, opened)
        if self.tool_calls in (None, "auto"):
            self.tool_calls = rules.detect_tool_call_parser(template, tokenizer, toggle, opened)

    def check_tools(self, tools: list[dict[str, Any]] | None) -> None:
        """Refuse tools where their calls could not be found.

        Raises:
            ApiError: says why.
        """
        if not tools:
            return
        if self.missing:
            raise bad(f"tool calls need SGLang's parsers, which can't be imported: {self.missing}", "tools")
        if not self.tool_calls:
            raise bad(
                "SGLang knows no tool calls for this model's chat template: name a parser with"
                " --sglang-tool-call-parser",
                "tools",
            )
        _sglang_tools(json.dumps(tools))

    def parse(self, text: str, prompt: str, tools: list[dict[str, Any]] | None) -> Parsed:
        """A response in its parts; `prompt` is the text before it, which may have opened the reasoning."""
        reasoning, content = "", text
        if self.reasoning and self.missing is None:
            reasoning, content = self._split_reasoning(text, prompt)
        if not tools:
            return Parsed(content, reasoning)
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        parser = FunctionCallParser(_sglang_tools(json.dumps(tools)), self.tool_calls)
        if not parser.has_tool_call(content):
            return Parsed(content, reasoning)
        try:
            normal, found = parser.parse_non_stream(content)
        except Exception:  # what its parsers raise at what a model may write is not specified
            normal, found = content, []
        calls = tuple((call.name or "", call.parameters) for call in found)
        if not calls or not all(name and _is_object(arguments) for name, arguments in calls):
            return Parsed(content, reasoning, unparsed=True)
        return Parsed(normal or "", reasoning, calls)

    def _split_reasoning(self, text: str, prompt: str) -> tuple[str, str]:
        from sglang.srt.parser.reasoning_parser import ReasoningParser

        parser = ReasoningParser(self.reasoning, stream_reasoning=False)
        start = getattr(parser.detector, "think_start_token", None)
        if start and prompt.rstrip().endswith(start):  # the template has opened it
            parser = ReasoningParser(self.reasoning, stream_reasoning=False, force_reasoning=True)
        reasoning, content = parser.parse_non_stream(text)
        if not reasoning:
            return "", text if content is None else content
        return reasoning.strip("\n"), (content or "").lstrip("\n")


def _import_sglang() -> str | None:
    """Import the parsers; why that fails, or None."""
    try:
        from rltrain.sglang import cpu

        cpu.install()
        import sglang.srt.function_call.function_call_parser
        import sglang.srt.parser.reasoning_parser
        import sglang.srt.parser.template_detection  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=256)
def _sglang_tools(tools: str) -> list[Any]:
    from pydantic import ValidationError
    from sglang.srt.entrypoints.openai.protocol import Tool

    try:
        return [Tool(**tool) for tool in json.loads(tools)]
    except (ValidationError, TypeError) as error:
        raise bad(f"tools: {error}", "tools") from None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
