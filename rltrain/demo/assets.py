"""Write what the demo needs: a model shape, a tokenizer and prompt files. No torch, nothing downloaded.

`python -m rltrain.demo.assets DIR` writes

    DIR/model/       config.json (a tiny Qwen3) and a tokenizer with one token a character; no weights
    DIR/sft.jsonl    prompts with the careless teacher's responses
    DIR/train.jsonl  prompts with the right results, for RL
    DIR/eval.jsonl   the same, of problems that appear in neither of the other files
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rltrain.demo.task import CHARACTERS, answer, carries, make_problems, question, teacher

SEED = 20
TRAIN_PROBLEMS = 4600
EVAL_PROBLEMS = 200
SFT_RESPONSES = 25_600
PAD, EOS = "<pad>", "<eos>"


def write_assets(directory: Path) -> None:
    """Write everything; the directory appears whole or not at all, and is left alone if it exists."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        (temporary / "model").mkdir()
        for name, content in {**tokenizer_files(), "config.json": model_config()}.items():
            (temporary / "model" / name).write_text(json.dumps(content, indent=2) + "\n")
        for name, rows in prompt_rows().items():
            _write_jsonl(temporary / name, rows)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prompt_rows() -> dict[str, list[dict[str, Any]]]:
    """The rows of the three prompt files, by file name. The evaluation problems are in no other file."""
    problems = make_problems(TRAIN_PROBLEMS + EVAL_PROBLEMS, SEED)
    train, held_out = problems[:TRAIN_PROBLEMS], problems[TRAIN_PROBLEMS:]
    rng = random.Random(SEED)
    lessons = [rng.choice(train) for _ in range(SFT_RESPONSES)]
    return {
        "sft.jsonl": [{"input": question(p), "label": teacher(p, rng)} for p in lessons],
        "train.jsonl": [_graded(p) for p in train],
        "eval.jsonl": [_graded(p) for p in held_out],
    }


def model_config(characters: str = CHARACTERS) -> dict[str, Any]:
    """A Qwen3 of two layers of width 64: 90 thousand parameters."""
    vocabulary = _vocabulary(characters)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "pad_token_id": vocabulary[PAD],
        "bos_token_id": None,
        "eos_token_id": vocabulary[EOS],
    }


def tokenizer_files(characters: str = CHARACTERS) -> dict[str, dict[str, Any]]:
    """`tokenizer.json` and its configuration: every character is a token, nothing is merged."""
    vocabulary = _vocabulary(characters)
    special = [
        {"id": vocabulary[token], "content": token, "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for token in (PAD, EOS)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": PAD},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _vocabulary(characters: str) -> dict[str, int]:
    return {token: i for i, token in enumerate([PAD, EOS, *characters])}


def _graded(problem: tuple[int, int]) -> dict[str, Any]:
    return {"input": question(problem), "label": answer(problem), "metadata": {"carry": carries(problem)}}


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rltrain.demo.assets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="left alone if it exists")
    write_assets(parser.parse_args().directory)


if __name__ == "__main__":
    main()
