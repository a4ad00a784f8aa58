"""The model may search before it answers: what stands in brackets is a query, and the best document comes back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rltrain.rollout.sglang_rollout import GenerateState
from rltrain.rollout.sglang_rollout import generate as generate_turn
from rltrain.sample import Sample

MOST_QUERIES = 2


class Index:
    """Finds the document that shares most words with a query; of several such, the first."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents = [(document, set(document.split())) for document in documents]

    def search(self, query: str) -> str:
        """The best document, or `none` if it shares no word."""
        words = set(query.split())
        document, shared = max(self._documents, key=lambda each: len(words & each[1]))
        return document if words & shared else "none"


@cache
def load_index(path: str) -> Index:
    """The index over the lines of a file; read once."""
    return Index(Path(path).read_text().splitlines())


async def generate(args: argparse.Namespace, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """Turns until the model ends without a query. What the search finds is not trained on.

    `search_documents` comes from the file that --custom-config-path names.
    """
    index, tokenizer = load_index(args.search_documents), GenerateState(args).tokenizer
    for _ in range(MOST_QUERIES + 1):
        sample = await generate_turn(args, sample, {**sampling_params, "stop": ["]"]})
        query = re.search(r"\[([^\[\]]*)\]$", sample.response)
        if query is None or sample.status is not Sample.Status.COMPLETED:
            break
        found = index.search(query[1]) + ";"
        tokens = tokenizer.encode(found, add_special_tokens=False)
        sample.append_response_tokens(args, tokens=tokens, trainable=False, text=found)
    return sample


async def reward(args: argparse.Namespace, sample: Sample) -> float:
    """1 if what stands after the last document is the label."""
    return float(sample.response.split(";")[-1] == sample.label)
