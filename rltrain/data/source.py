"""Where samples come from: the prompts of the files, and `RolloutDataSource`, which says what comes next.

The order of an epoch is a pure function of the seed and the epoch's number.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.groups.data import Data
from rltrain.data.prompt_file import Prompt, PromptFile
from rltrain.data.tokenizer import encode, load_tokenizer, render
from rltrain.functions import load_function
from rltrain.run.errors import UserError
from rltrain.run.files import replace_text
from rltrain.sample import Message, Sample

_CHUNK = 128  # prompts tokenised in one go, and in memory at a time


class PromptSet:
    """Prompts in file order, without those that are longer than `--rollout-max-prompt-len`.

    Attributes:
        sizes: Prompts of each file.
        num_too_long: Prompts that were left out, because they are too long.
    """

    def __init__(self, config: Config, paths: Sequence[str], input_key: str, label_key: str | None) -> None:
        """Read the files.

        Raises:
            UserError: a file cannot be read as prompts, or every prompt of it is too long.
        """
        self._config = config
        self._tokenizer = load_tokenizer(config.model.hf_checkpoint)
        self._files: list[PromptFile] = []
        self._kept: list[Sequence[int]] = []  # rows of each file
        self.sizes: list[int] = []
        self.num_too_long = 0
        limit = config.rollout.rollout_max_prompt_len
        for path in paths:
            file = PromptFile(path, input_key, label_key, config.data.metadata_key, config.data.tool_key)
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
        config = self._config
        takes_messages = (
            config.functions.custom_generate_function_path or config.algorithm.loss_type == "sft_loss"
        )
        if takes_messages and not config.data.apply_chat_template:
            shown = [prompt.prompt for prompt in prompts]
        else:
            kwargs = config.data.apply_chat_template_kwargs
            shown = [
                render(prompt, self._tokenizer, chat_template=config.data.apply_chat_template, kwargs=kwargs)
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


class EmptyPrompts:
    """In the place of a `PromptSet` with --disable-rollout-global-dataset: one unknown prompt per epoch.

    Attributes:
        sizes: Prompts of each file.
        num_too_long: Prompts that were left out as too long: none.
    """

    sizes, num_too_long = (1,), 0

    def groups(
        self, positions: Sequence[int], size: int, *, first_group: int = 0, first_index: int = 0
    ) -> list[list[Sample]]:
        """For each position a group of `size` samples without prompt, tokens or label; see `PromptSet.groups`."""
        return [
            [Sample(group_index=first_group + i, index=first_index + i * size + j) for j in range(size)]
            for i in range(len(positions))
        ]


@dataclass(frozen=True)
class Epochs:
    """Positions in the joined prompts of several files.

    A file of weight 2 has each prompt twice in an epoch; of weight 0.5, half of its prompts, the other half
    in the next epoch: over epochs all prompts of a file come equally often.
    """

    sizes: tuple[int, ...]  # prompts of each file
    weights: tuple[float, ...]
    seed: int = 0
    shuffle: bool = False

    def __len__(self) -> int:
        """Prompts of an epoch."""
        return sum(self._share(i) for i in range(len(self.sizes)))

    def order(self, epoch: int) -> Sequence[int]:
        """The positions of an epoch: the same for the same seed, on every machine."""
        return _order(self, epoch)

    def _share(self, file: int) -> int:
        return max(1, round(self.sizes[file] * self.weights[file]))


@lru_cache(maxsize=1)
def _order(epochs: Epochs, epoch: int) -> Sequence[int]:
    positions = array("q")  # 8 bytes a prompt
    first = 0
    for file, size in enumerate(epochs.sizes):
        share = epochs._share(file)
        own: Sequence[int] = range(size)
        if share % size:  # which ones come is drawn; where that goes on is the next epoch's start
            own = array("q", own)
            random.Random(f"{epochs.seed}/file {file}").shuffle(own)
        positions.extend(first + own[(epoch * share + i) % size] for i in range(share))
        first += size
    if epochs.shuffle:
        random.Random(f"{epochs.seed}/{epoch}").shuffle(positions)
    return positions


def prompt_files(data: Data) -> list[tuple[str, float]]:
    """The prompt files that the flags name, each with its weight; none with --disable-rollout-global-dataset."""
    if not data.rollout_global_dataset:
        return []
    if data.prompt_data_mix:
        mix = data.prompt_data_mix
        return [(path, float(weight)) for path, weight in zip(mix[::2], mix[1::2], strict=True)]
    assert data.prompt_data is not None
    return [(data.prompt_data, 1.0)]


class RolloutDataSource:
    """Groups of samples to generate, from `--prompt-data`, endlessly; each epoch in its own order.

    Groups given back with `add_samples` come first the next time. `save` and `load` make a restart go on
    exactly where the rollout before it stopped, given-back groups included.

    Attributes:
        metadata: What a subclass wants to be stored with the state; JSON-able.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the prompts.

        Raises:
            UserError: see `PromptSet`, or too few prompts are short enough for a batch.
        """
        self._args = args
        config = Config.of(args)
        files = prompt_files(config.data)
        self._prompts = (
            PromptSet(config, [path for path, _ in files], args.input_key, args.label_key)
            if files
            else EmptyPrompts()
        )
        sizes, weights = tuple(self._prompts.sizes), tuple(weight for _, weight in files) or (1.0,)
        self._epochs = Epochs(sizes, weights, args.rollout_seed, args.rollout_shuffle or len(files) > 1)
        self.num_prompts_too_long = self._prompts.num_too_long
        if self.num_prompts_too_long and len(self) < args.rollout_batch_size:
            raise UserError(
                f"{self.num_prompts_too_long} prompts are longer than --rollout-max-prompt-len"
                f" {args.rollout_max_prompt_len}, and the {len(self)} others of an epoch are fewer than"
                f" --rollout-batch-size {args.rollout_batch_size}: one batch would hold the same prompt twice."
            )
        self._buffer: list[list[Sample]] = []
        self.metadata: dict[str, Any] = {}
        self._reset()

    def __len__(self) -> int:
        """Number of prompts in an epoch."""
        return len(self._epochs)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """The next `num_samples` groups of `--n-samples-per-prompt` samples each."""
        groups = self._from_buffer(num_samples)
        size = self._args.n_samples_per_prompt
        positions = [self._next_position() for _ in range(num_samples - len(groups))]
        groups += self._prompts.groups(
            positions, size, first_group=self._group_index, first_index=self._sample_index
        )
        self._group_index += len(positions)
        self._sample_index += len(positions) * size
        return groups

    def add_samples(self, groups: list[list[Sample]]) -> None:
        """Give groups back, to be had again before new ones."""
        self._buffer += groups

    def get_buffer_length(self) -> int:
        """Number of groups that were given back and not yet had again."""
        return len(self._buffer)

    def save(self, rollout_id: int) -> None:
        """Store the state after rollout `rollout_id`."""
        state = {
            "epoch": self._epoch,
            "position": self._position,
            "group_index": self._group_index,
            "sample_index": self._sample_index,
            "num_prompts": len(self),
            "metadata": self.metadata,
            "buffer": [[sample.to_dict() for sample in group] for group in self._buffer],
        }
        file = self._state_file(rollout_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(state), durable=True)

    def load(self, rollout_id: int | None = None) -> None:
        """Go on as after rollout `rollout_id`; None or -1 for the very start.

        The state is looked for in this run, and then beside the checkpoint that `--load` names.
        """
        self._reset()
        if rollout_id is None or rollout_id < 0:
            return
        file = self._find_state(rollout_id)
        if file is None:
            print(
                f"warning: the data source has no state of rollout {rollout_id}: it begins at the first prompt"
            )
            return
        state: dict[str, Any] = json.loads(file.read_text())
        if state["num_prompts"] != len(self):
            print(
                f"warning: an epoch has {len(self)} prompts now and had {state['num_prompts']} before the restart:"
                " some may occur twice in this epoch, or not at all"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._group_index, self._sample_index = state["group_index"], state["sample_index"]
        self.metadata = state.get("metadata", {})
        self._buffer = [[Sample.from_dict(sample) for sample in group] for group in state["buffer"]]

    def _from_buffer(self, num_samples: int) -> list[list[Sample]]:
        """Groups that were given back, taken out of the buffer: the oldest, or what --buffer-filter-path takes."""
        path = self._args.buffer_filter_path
        if not path or not self._buffer:
            groups, self._buffer = self._buffer[:num_samples], self._buffer[num_samples:]
            return groups
        # slime gives the filter no rollout id either; it takes its groups out of the list itself.
        groups = load_function(path, flag="--buffer-filter-path")(self._args, None, self._buffer, num_samples)
        if not isinstance(groups, list) or len(groups) > num_samples:
            raise UserError(
                f"--buffer-filter-path {path} returned {type(groups).__name__}; expected a list of at most"
                f" {num_samples} groups."
            )
        taken = {id(group) for group in groups}
        self._buffer = [group for group in self._buffer if id(group) not in taken]
        return groups

    def _reset(self) -> None:
        self._epoch = self._position = self._group_index = self._sample_index = 0
        self._buffer = []
        self.metadata = {}

    def _next_position(self) -> int:
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        position = self._position
        self._position += 1
        return self._epochs.order(self._epoch)[position]

    def _state_file(self, rollout_id: int) -> Path:
        return Path(self._args.rollout_state_dir) / f"{rollout_id:07d}.json"

    def _find_state(self, rollout_id: int) -> Path | None:
        file = self._state_file(rollout_id)
        candidates = [file]
        if self._args.load:
            candidates.append(Path(self._args.load) / file.parent.name / file.name)
        return next((each for each in candidates if each.is_file()), None)
