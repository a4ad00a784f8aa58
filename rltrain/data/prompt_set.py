"""The prompts of one file or several, ready to be generated from: as samples with text and token ids."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

from rltrain.arguments.errors import UserError
from rltrain.data.prompts import Message, Prompt, read_prompts
from rltrain.data.tokenizer import encode, load_tokenizer, render
from rltrain.sample import Sample

_CHUNK = 1000  # prompts tokenised in one go


class PromptSet:
    """Prompts in file order, without those that are longer than `--rollout-max-prompt-len`.

    Attributes:
        sizes: Prompts of each file.
        num_too_long: Prompts that were left out.
    """

    def __init__(
        self, args: argparse.Namespace, paths: Sequence[str], input_key: str, label_key: str | None
    ) -> None:
        """Read the files.

        Raises:
            UserError: a file is not as it should be, or every prompt of it is too long.
        """
        self._args = args
        self._tokenizer = load_tokenizer(args.hf_checkpoint)
        self._prompts: list[Prompt] = []
        self.sizes: list[int] = []
        self.num_too_long = 0
        limit = args.rollout_max_prompt_len
        for path in paths:
            prompts = list(read_prompts(path, input_key, label_key, args.metadata_key, args.tool_key))
            kept = prompts if limit is None else self._shorter_than(prompts, limit)
            if not kept:
                raise UserError(
                    f"{path}: all {len(prompts)} prompts are longer than --rollout-max-prompt-len {limit}."
                )
            self._prompts += kept
            self.sizes.append(len(kept))
            self.num_too_long += len(prompts) - len(kept)

    def __len__(self) -> int:
        return len(self._prompts)

    def groups(
        self, positions: Sequence[int], size: int, *, first_group: int = 0, first_index: int = 0
    ) -> list[list[Sample]]:
        """For each position a group of `size` samples to generate; `tokens` holds the prompt.

        Groups and samples are numbered on from `first_group` and `first_index`.
        """
        prompts = [self._prompts[position] for position in positions]
        texts, tokens = self._tokenize(prompts)
        return [
            [
                Sample(
                    group_index=first_group + i,
                    index=first_index + i * size + j,
                    prompt=texts[i],
                    tokens=list(tokens[i]),
                    label=prompt.label,
                    metadata=copy.deepcopy(prompt.metadata),
                )
                for j in range(size)
            ]
            for i, prompt in enumerate(prompts)
        ]

    def _tokenize(self, prompts: Sequence[Prompt]) -> tuple[list[str | list[Message]], list[list[int]]]:
        """What the samples' `prompt` is, and its token ids: none for messages that stay messages."""
        args = self._args
        if args.custom_generate_function_path and not args.apply_chat_template:
            shown = [prompt.prompt for prompt in prompts]  # a custom function may want the messages
        else:
            kwargs = args.apply_chat_template_kwargs
            shown = [
                render(prompt, self._tokenizer, chat_template=args.apply_chat_template, kwargs=kwargs)
                for prompt in prompts
            ]
        texts = {i: text for i, text in enumerate(shown) if isinstance(text, str)}
        ids = dict(zip(texts, encode(list(texts.values()), self._tokenizer), strict=True))
        return shown, [ids.get(i, []) for i in range(len(shown))]

    def _shorter_than(self, prompts: list[Prompt], limit: int) -> list[Prompt]:
        kept: list[Prompt] = []
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            _, tokens = self._tokenize(chunk)
            kept += [prompt for prompt, ids in zip(chunk, tokens, strict=True) if len(ids) <= limit]
        return kept
