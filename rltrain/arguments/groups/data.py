"""Prompts: the files, and the fields of a row that are used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rltrain.arguments.declare import flag
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Data:
    """Data."""

    prompt_data: str | None = flag("JSONL, Parquet or CSV prompts; FILE@[a:b] takes a slice", metavar="FILE")
    prompt_data_mix: list[str] | None = flag(
        "instead of --prompt-data: pairs of a file and its prompts' number of occurrences in an epoch (0.5: half of"
        " them)",
        metavar="FILE WEIGHT",
        owner="slurmlime",
    )
    rollout_global_dataset: bool = flag(
        "no prompts: samples begin empty, and your own function fills them",
        True,
        option="--disable-rollout-global-dataset",
    )
    input_key: str = flag("field of the prompt: text or messages (default: input)", "input", metavar="KEY")
    label_key: str | None = flag("field of the answer that the reward compares with", metavar="KEY")
    metadata_key: str = flag("field of further data (default: metadata)", "metadata", metavar="KEY")
    tool_key: str = flag("field of the chat template's tools (default: tools)", "tools", metavar="KEY")
    apply_chat_template: bool = flag("render messages with the tokenizer's template", False)
    apply_chat_template_kwargs: dict[str, Any] = flag("arguments of the chat template", {}, metavar="JSON")
    rollout_shuffle: bool = flag("shuffle the prompts in every epoch", False)


def resolve_data(data: Data) -> Data:
    """Make the files' paths absolute: the job may run in another directory than the one it was submitted from.

    Raises:
        UserError: names the flag and the word that can't be right.
    """
    _check_mix(data)
    mix = data.prompt_data_mix
    return replace(
        data,
        prompt_data=None if data.prompt_data is None else absolute(data.prompt_data),
        prompt_data_mix=mix and [word if i % 2 else absolute(word) for i, word in enumerate(mix)],
    )


def absolute(path: str) -> str:
    """The path from the root, with `~` for the home directory."""
    return str(Path(path).expanduser().absolute())


def _check_mix(data: Data) -> None:
    mix = data.prompt_data_mix or []
    if (mix or data.prompt_data) and not data.rollout_global_dataset:
        raise UserError(
            "--disable-rollout-global-dataset, and --prompt-data or --prompt-data-mix: leave one of them out."
        )
    if mix and data.prompt_data:
        raise UserError("--prompt-data and --prompt-data-mix: give one of them.")
    if len(mix) % 2:
        raise UserError(f"--prompt-data-mix takes pairs of a file and a weight, but got {len(mix)} words.")
    for word in mix[1::2]:
        try:
            positive = float(word) > 0
        except ValueError:
            positive = False
        if not positive:
            raise UserError(f"--prompt-data-mix: the weight {word!r} is not a number greater than 0.")
