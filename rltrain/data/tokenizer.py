"""The model's tokenizer, and prompts as text and token ids. transformers is imported only when used."""

from __future__ import annotations

from functools import cache
from typing import Any

from rltrain.data.prompt_file import Prompt
from rltrain.run.errors import UserError
from rltrain.run.plain import clean_text


@cache
def load_tokenizer(hf_checkpoint: str) -> Any:
    """The Hugging Face tokenizer in a model directory.

    Raises:
        UserError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(hf_checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf-checkpoint {hf_checkpoint}: no usable tokenizer in it ({error}).") from None


def render(prompt: Prompt, tokenizer: Any, *, chat_template: bool, kwargs: dict[str, Any]) -> str:
    """The text that the model is given: through the chat template, or as it is.

    A plain text goes through the template as the one message of the user.

    Raises:
        UserError: messages without a template, or a tokenizer that has none.
    """
    if not chat_template:
        if isinstance(prompt.prompt, str):
            return prompt.prompt
        raise UserError(
            "the prompts are lists of messages, which only a chat template can turn into text: add"
            " --apply-chat-template, or write the prompts as plain text."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "--apply-chat-template: the model's tokenizer has no chat template. Take a model that has one, or"
            " write the prompts as plain text and leave the flag out."
        )
    messages = (
        [{"role": "user", "content": prompt.prompt}] if isinstance(prompt.prompt, str) else prompt.prompt
    )
    return tokenizer.apply_chat_template(
        messages, tools=prompt.tools, tokenize=False, add_generation_prompt=True, **kwargs
    )


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text. No special tokens are added: chat templates write their own."""
    # A function of a user may have made the text: half a character, which no tokenizer takes, must not end the run.
    return tokenizer([*map(clean_text, texts)], add_special_tokens=False)["input_ids"] if texts else []
