"""Which characters of a rendered conversation the model itself has to write: its own turns, to their end.

Nothing is known of the chat template. Where a turn begins is where the prompt for it ends; where it ends is seen by
rendering the conversation with other content in the message after it. So this also works for templates that drop
earlier turns' reasoning.

Some templates, such as GLM's, have no mark for the end of a turn: the model writes the token that begins the next
message, and generation stops there. That token is then the end mark, and it is put after the last turn, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rltrain.run.errors import UserError
from rltrain.sample import Message

Render = Callable[[list[Message], bool], str]
Span = tuple[int, int]

_A, _B = "①a", "②b"  # contents that differ from the first character on
_LOSS_KEY = "step_loss_mask"


def tokens_and_mask(
    messages: Sequence[Message], tokenizer: Any, **kwargs: Any
) -> tuple[list[int], list[int]]:
    """A conversation as token ids, and for each of them 1 if it is trained on.

    Trained on are the assistant's messages, without those that have `step_loss_mask` 0.

    Args:
        kwargs: For the chat template: `tools`, …

    Raises:
        UserError: the tokenizer has no chat template, or one that shows a turn otherwise than its prompt.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the prompts are conversations, and the model's tokenizer has no chat template to turn them into text."
        )

    def render(messages: list[Message], prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)

    text, spans = _closed(*text_and_spans(messages, render), messages, render, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        int(any(start <= begin < end for start, end in spans) and stop > begin)
        for begin, stop in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], mask


def text_and_spans(messages: Sequence[Message], render: Render) -> tuple[str, list[Span]]:
    """The rendered conversation, and the characters [start, end) of each turn that is trained on.

    Args:
        render: `render(messages, add_generation_prompt)`, the chat template.

    Raises:
        UserError: see `tokens_and_mask`.
    """
    shown = [{key: value for key, value in each.items() if key != _LOSS_KEY} for each in messages]
    text = render(shown, False)
    turns = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and message.get(_LOSS_KEY, 1)
    ]
    return text, [(_start(text, shown, i, render), _end(text, shown, i, render)) for i in turns]


def _closed(
    text: str, spans: list[Span], messages: Sequence[Message], render: Render, tokenizer: Any
) -> tuple[str, list[Span]]:
    """The same, with the token that begins the next message as the end of a turn, if there is no other end mark."""
    between, mark, after = _between("user", render)
    if not spans or mark or after.strip():
        return text, spans
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if messages[-1]["role"] == "assistant":
        text = text.rstrip() + (_first_of(special, between) or tokenizer.eos_token or "")
    closed = []
    for start, end in spans:
        space = len(text[end:]) - len(text[end:].lstrip())
        begins = _first_of(special, text[end:])
        closed.append((start, end + space + len(begins) if begins else end))
    return text, closed


def _first_of(tokens: Sequence[str], text: str) -> str:
    """The longest of the tokens that the text begins with, after white space; "" if it begins with none."""
    return max((token for token in tokens if text.lstrip().startswith(token)), key=len, default="")


def _start(text: str, messages: list[Message], turn: int, render: Render) -> int:
    prompt = render(messages[:turn], True)
    if not text.startswith(prompt):
        raise UserError(
            f"message {turn} of a conversation: the chat template renders the text before it differently in the whole"
            f" conversation ({text[:80]!r}…) and as its prompt ({prompt[:80]!r}…). Train on single turns instead:"
            " a prompt with --label-key."
        )
    return len(prompt)


def _end(text: str, messages: list[Message], turn: int, render: Render) -> int:
    """Where the turn's end mark ends; white space after it is not the model's."""
    if turn == len(messages) - 1:
        return len(text.rstrip())
    role = messages[turn + 1]["role"]
    between, mark, _ = _between(role, render)
    following = _common_prefix(*(render(_with_content(messages, turn + 1, each), False) for each in (_A, _B)))
    if not text[:following].endswith(between):
        raise UserError(
            f"message {turn + 1} of a conversation: the chat template does not mark the end of the turn before it."
            " Train on"
            " single turns instead: a prompt with --label-key."
        )
    return following - len(between) + len(mark)


def _between(role: str, render: Render) -> tuple[str, str, str]:
    """Returns the text between two turns (the second of `role`), the end mark in it, and the text after the last
    turn."""
    turn: list[Message] = [{"role": "user", "content": "u"}, {"role": "assistant", "content": _A}]
    after = render(turn, False).partition(_A)[2]
    both = render([*turn, {"role": role, "content": _B}], False)
    between = both.partition(_A)[2].partition(_B)[0]
    mark = after.rstrip()
    return between, mark if between.startswith(mark) else "", after


def _with_content(messages: list[Message], index: int, content: str) -> list[Message]:
    return [{**each, "content": content} if i == index else each for i, each in enumerate(messages)]


def _common_prefix(one: str, other: str) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
