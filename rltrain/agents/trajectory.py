"""What one agent sampled, as a tree of turns over token ids; and the samples that it is trained on.

A turn is one request with its response. A request whose prompt begins with everything that a turn holds, prompt and
response, goes on from there; the deepest such turn is its parent. Any other request begins at the root: its history was
edited, compacted, tokenised otherwise, or belongs to another conversation. Only token ids are compared, never text.

Every path from the root to a leaf is one text of the agent. Turns that several paths share are trained in the first
of them, and belong to the prompt of the others. So each sampled token is trained exactly once, after exactly the tokens
that the engine saw before it.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.sample import Sample

_IDS = "i"  # type code: 4 bytes a token, where a list has 36


@dataclass(frozen=True)
class Sampled:
    """A response as the engine gave it.

    Attributes:
        tokens: ids; not empty.
        log_probs: one a token.
        spans: which tokens each version of the weights wrote, as `Sample.weight_version_spans`, counted from 0.
        status: how it ended.
    """

    tokens: Sequence[int]
    log_probs: Sequence[float]
    spans: Sequence[dict[str, Any]] = ()
    status: Sample.Status = Sample.Status.COMPLETED
    spec_info: Sample.SpecInfo = field(default_factory=Sample.SpecInfo)
    prefix_cache_info: Sample.PrefixCacheInfo = field(default_factory=Sample.PrefixCacheInfo)


@dataclass(frozen=True)
class Turn:
    """A request with its response.

    Attributes:
        number: from 0, in the order of the responses.
        parent: number of the turn whose tokens the prompt begins with; None at the root.
        added: the prompt after the parent's tokens; at the root the whole prompt.
        length: tokens of prompt and response together.
    """

    number: int
    parent: int | None
    added: array[int]
    sampled: Sampled
    length: int

    @property
    def prompt_length(self) -> int:
        """Tokens before the response."""
        return self.length - len(self.sampled.tokens)


@dataclass(frozen=True)
class Path:
    """One text of the agent: the turns that are trained in it, each the parent of the next, and the tokens before."""

    prompt: array[int]
    turns: tuple[Turn, ...]


class Trajectory:
    """The turns of one session."""

    def __init__(self) -> None:
        self.turns: dict[int, Turn] = {}
        self._children: dict[int | None, list[int]] = {None: []}
        self._next = 0

    def find(self, prompt: Sequence[int]) -> int | None:
        """The deepest turn with whose prompt and response `prompt` begins; of equal ones the latest."""
        ids = prompt if isinstance(prompt, array) else array(_IDS, prompt)
        best: int | None = None
        open_turns = list(self._children[None])
        while open_turns:
            turn = self.turns[open_turns.pop()]
            start = turn.prompt_length - len(turn.added)
            if turn.length > len(ids) or not _has_at(ids, start, turn.added):
                continue
            if not _has_at(ids, turn.prompt_length, turn.sampled.tokens):
                continue
            if best is None or (turn.length, turn.number) > (self.turns[best].length, best):
                best = turn.number
            open_turns += self._children[turn.number]
        return best

    def add(self, prompt: Sequence[int], sampled: Sampled) -> Turn:
        """Hold a response to the prompt with these ids.

        Raises:
            ValueError: there are no tokens, or not one log-prob for each.
        """
        if not sampled.tokens or len(sampled.tokens) != len(sampled.log_probs):
            raise ValueError(f"{len(sampled.tokens)} tokens sampled with {len(sampled.log_probs)} log-probs")
        ids = array(_IDS, prompt)
        parent = self.find(ids)
        held = 0 if parent is None else self.turns[parent].length
        compact = copy.copy(sampled)
        object.__setattr__(compact, "tokens", array(_IDS, sampled.tokens))
        object.__setattr__(compact, "log_probs", array("d", sampled.log_probs))
        turn = Turn(self._next, parent, ids[held:], compact, len(ids) + len(sampled.tokens))
        self.turns[turn.number] = turn
        self._children[turn.number] = []
        self._children[parent].append(turn.number)
        self._next += 1
        return turn

    def discard(self, number: int) -> None:
        """Forget a response that never reached the agent; one that the agent went on from is kept."""
        if number in self.turns and not self._children[number]:
            self._children[self.turns.pop(number).parent].remove(number)
            del self._children[number]

    def tokens(self, number: int) -> array[int]:
        """All ids of a turn: its prompt and its response."""
        ids = array(_IDS)
        for turn in self.path(number):
            ids += turn.added
            ids.extend(turn.sampled.tokens)
        return ids

    def path(self, number: int | None) -> list[Turn]:
        """The turns from the root to this one."""
        turns: list[Turn] = []
        while number is not None:
            turns.append(self.turns[number])
            number = turns[-1].parent
        return turns[::-1]

    def paths(self) -> list[Path]:
        """One for each leaf, in the order of the leaves; every turn is in exactly one."""
        trained: set[int] = set()
        found: list[Path] = []
        for number, children in self._children.items():
            if number is None or children:
                continue
            turns = self.path(number)
            own = tuple(turn for turn in turns if turn.number not in trained)
            before = len(turns) - len(own)
            prompt = self.tokens(turns[before - 1].number) if before else array(_IDS)
            found.append(Path(prompt + own[0].added, own))
            trained.update(turn.number for turn in own)
        return found


def to_samples(trajectory: Trajectory, like: Sample, decode: Callable[[Sequence[int]], str]) -> list[Sample]:
    """A sample for each path, as copies of `like`, with its `rollout_key` as their `rollout_id`.

    Sampled tokens have mask 1 and their log-probs; text in between, such as tool output, has mask 0.
    """
    samples = []
    for path in trajectory.paths():
        sample = copy.deepcopy(like)
        sample.rollout_id = like.rollout_key
        sample.tokens, sample.response, sample.response_length = list(path.prompt), "", 0
        sample.loss_mask, sample.rollout_log_probs, sample.teacher_log_probs = [], [], None
        sample.weight_versions, sample.weight_version_spans = [], []
        sample.spec_info, sample.prefix_cache_info = Sample.SpecInfo(), Sample.PrefixCacheInfo()
        for i, turn in enumerate(path.turns):
            if i:
                added = list(turn.added)
                sample.append_response_tokens(tokens=added, trainable=False, text=decode(added))
            _append(sample, turn.sampled, decode)
        samples.append(sample)
    return samples


def _append(sample: Sample, sampled: Sampled, decode: Callable[[Sequence[int]], str]) -> None:
    tokens = list(sampled.tokens)
    sample.append_response_tokens(
        tokens=tokens,
        log_probs=list(sampled.log_probs),
        meta_info={"weight_versions": list(sampled.spans)},
        text=decode(tokens),
    )
    sample.status = sampled.status
    for total, part in (
        (sample.spec_info, sampled.spec_info),
        (sample.prefix_cache_info, sampled.prefix_cache_info),
    ):
        for name, value in vars(part).items():
            setattr(total, name, getattr(total, name) + value)


def _has_at(ids: array[int], start: int, part: Sequence[int]) -> bool:
    return ids[start : start + len(part)] == part
