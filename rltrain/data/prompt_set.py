"""The prompts of one file or several, read as they are needed: as samples with text and token ids."""

from __future__ import annotations

import argparse
import copy
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice

from rltrain.arguments.errors import UserError
from rltrain.data.prompt_file import PromptFile
from rltrain.data.prompts import Message, Prompt
from rltrain.data.tokenizer import encode, load_tokenizer, render
from rltrain.sample import Sample

_CHUNK = 128  # prompts tokenised in one go, and in memory at a time


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
        self._files: list[PromptFile] = []
        self._kept: list[Sequence[int]] = []  # rows of each file
        self.sizes: list[int] = []
        self.num_too_long = 0
        limit = args.rollout_max_prompt_len
        for path in paths:
            file = PromptFile(path, input_key, label_key, args.metadata_key, args.tool_key)
            kept = range(len(file)) if limit is None else self._shorter_than(file, limit)
            if not kept:
                raise UserError(
                    f"{path}: all {len(file)} prompts are longer than --rollout-max-prompt-len {limit}."
                )
            self._files.append(file)
            self._kept.append(kept)
            self.sizes.append(len(kept))
            self.num_too_long += len(file) - len(kept)
        self._starts = list(accumulate(self.sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position in the joined files."""
        file = bisect_right(self._starts, position) - 1
        return self._files[file][self._kept[file][position - self._starts[file]]]

    def groups(
        self, positions: Sequence[int], size: int, *, first_group: int = 0, first_index: int = 0
    ) -> list[list[Sample]]:
        """For each position a group of `size` samples to generate; `tokens` holds the prompt.

        Groups and samples are numbered on from `first_group` and `first_index`.
        """
        prompts = [self[position] for position in positions]
        texts, tokens = self._tokenize(prompts)
        return [
            [
                Sample(
                    group_index=first_group + i,
                    index=first_index + i * size + j,
                    prompt=texts[i],
                    tokens=list(tokens[i]),
                    label=prompt.label,
                    metadata=copy.deepcopy(prompt.metadata) if prompt.metadata else {},
                )
                for j in range(size)
            ]
            for i, prompt in enumerate(prompts)
        ]

    def _tokenize(self, prompts: Sequence[Prompt]) -> tuple[list[str | list[Message]], list[list[int]]]:
        """What the samples' `prompt` is, and its token ids: none for messages that stay messages."""
        args = self._args
        takes_messages = args.custom_generate_function_path or args.loss_type == "sft_loss"
        if takes_messages and not args.apply_chat_template:
            shown = [prompt.prompt for prompt in prompts]
        else:
            kwargs = args.apply_chat_template_kwargs
            shown = [
                render(prompt, self._tokenizer, chat_template=args.apply_chat_template, kwargs=kwargs)
                for prompt in prompts
            ]
        texts = {i: text for i, text in enumerate(shown) if isinstance(text, str)}
        ids = dict(zip(texts, encode(list(texts.values()), self._tokenizer), strict=True))
        return shown, [ids.get(i, []) for i in range(len(shown))]

    def _shorter_than(self, file: PromptFile, limit: int) -> Sequence[int]:
        kept, prompts, start = array("q"), iter(file), 0
        while chunk := list(islice(prompts, _CHUNK)):
            _, tokens = self._tokenize(chunk)
            kept.extend(start + i for i, ids in enumerate(tokens) if len(ids) <= limit)
            start += len(chunk)
        return kept
