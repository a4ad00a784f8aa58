"""`RolloutDataSource`: which prompts come next, over epochs and restarts."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rltrain.arguments.errors import UserError
from rltrain.data.epochs import Epochs, prompt_files
from rltrain.data.prompt_set import PromptSet
from rltrain.functions import load_function
from rltrain.sample import Sample


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
        files = prompt_files(args)
        self._prompts = PromptSet(args, [path for path, _ in files], args.input_key, args.label_key)
        weights = tuple(weight for _, weight in files)
        self._epochs = Epochs(
            tuple(self._prompts.sizes), weights, args.rollout_seed, args.rollout_shuffle or len(files) > 1
        )
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
        """Store the state as it is after rollout `rollout_id`."""
        state = {
            "epoch": self._epoch,
            "position": self._position,
            "group_index": self._group_index,
            "sample_index": self._sample_index,
            "num_prompts": len(self),
            "metadata": self.metadata,
            "buffer": [[sample.to_dict() for sample in group] for group in self._buffer],
        }
        _write_atomically(self._state_file(rollout_id), json.dumps(state))

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
                f"warning: an epoch has {len(self)} prompts now and had"
                f" {state['num_prompts']} before the restart: some may come twice in this epoch, or not at all"
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
                f"--buffer-filter-path {path} returned {type(groups).__name__}, where a list of at most"
                f" {num_samples} groups is wanted."
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


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
