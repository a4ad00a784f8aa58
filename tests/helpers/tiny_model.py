"""A tiny random Qwen3 with a character tokenizer, made on the fly: 2 layers, hidden size 64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rltrain.packages import quick_distributions

CHARACTERS = "0123456789+-*=() abcdefghijklmnopqrstuvwxyz?.:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token a character; unknown ones are `<unk>`; `<eos>` ends a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    with quick_distributions():
        from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocab |= {character: len(vocab) + i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = chat_template
    return fast


def make_model(
    directory: Path,
    *,
    seed: int = 0,
    weights: bool = True,
    tokenizer: Any = None,
    vocab_size: int = 64,
    context: int = 512,
) -> Path:
    """Write config, tokenizer and (fp32, random) weights into `directory` and return it; quick without weights."""
    tokenizer = tokenizer or make_tokenizer()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32", "hidden_act": "silu",
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": context,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))  # transformers' own class would import torch
    if weights:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(seed)
        Qwen3ForCausalLM(Qwen3Config.from_dict(config)).save_pretrained(directory)
    return directory
