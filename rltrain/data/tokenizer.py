"""The model's tokenizer, and prompts as text and token ids. transformers is imported only when used."""

from __future__ import annotations

import contextlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from rltrain.data.prompt_file import Prompt
from rltrain.run.errors import UserError
from rltrain.run.plain import clean_text

# Classes that AutoTokenizer takes as `tokenizer_config.json` names them, with the types of model for which it does.
_ANY_TOKENIZER = frozenset(
    {
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "llama",
        "olmo2",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "smollm3",
    }
)
TAKEN_AS_NAMED = {
    "PreTrainedTokenizerFast": _ANY_TOKENIZER,
    "TokenizersBackend": _ANY_TOKENIZER,
    "Qwen2Tokenizer": frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}),
}


@cache
def load_tokenizer(hf_checkpoint: str) -> Any:
    """The Hugging Face tokenizer in a model directory.

    Raises:
        UserError: there is none, or it can't be read.
    """
    from rltrain.packages import quick_distributions

    with quick_distributions():
        import transformers

    try:
        # AutoTokenizer reads the model's configuration, too, and for that imports torch: seconds, and 200 MB.
        loader = getattr(transformers, named_class(Path(hf_checkpoint)) or "AutoTokenizer")
        return loader.from_pretrained(hf_checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf-checkpoint {hf_checkpoint}: no usable tokenizer in it ({error}).") from None


def named_class(directory: Path) -> str | None:
    """The class that AutoTokenizer would take, where the files alone say it; else None."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        files = [directory / name for name in ("tokenizer_config.json", "config.json")]
        tokenizer, model = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        name: str = tokenizer.get("tokenizer_class") or ""
        is_plain = "auto_map" not in tokenizer and (directory / "tokenizer.json").is_file()
        if is_plain and model.get("model_type") in TAKEN_AS_NAMED.get(name, ()):
            return name
    return None


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
            "--apply-chat-template: the model's tokenizer has no chat template. Use a model that has one, or"
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
