"""A rollout function that generates nothing: supervised fine-tuning.

`--loss-type sft_loss` takes it, without engines, unless `--rollout-function-path` names another one. A prompt is
either a conversation (a list of messages without --apply-chat-template), of which the assistant's turns are trained
on, or a text whose response is its label, ended by the end-of-sequence token.
"""

from __future__ import annotations

import argparse
from typing import Any

from rltrain.arguments.config import group_of
from rltrain.arguments.groups.data import Data
from rltrain.arguments.groups.model import Model
from rltrain.data.conversation import tokens_and_mask
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import encode, load_tokenizer
from rltrain.rollout.base_types import RolloutFnTrainOutput
from rltrain.run.errors import UserError
from rltrain.sample import Sample


def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: RolloutDataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The next `--rollout-batch-size` conversations, or prompts with their labels.

    Raises:
        UserError: a prompt has no label, the tokenizer no end-of-sequence token, or an evaluation was asked for.
    """
    if evaluation:  # the trainer has it: rltrain/validation.py
        raise UserError(
            "fine-tuning generates nothing: leave --rollout-function-path out, or --eval-interval."
        )
    groups = data_source.get_samples(args.rollout_batch_size)
    samples = [sample for group in groups for sample in group]
    add_responses(samples, group_of(args, Data), group_of(args, Model), load_tokenizer(args.hf_checkpoint))
    return RolloutFnTrainOutput(groups)


def add_responses(samples: list[Sample], data: Data, model: Model, tokenizer: Any) -> None:
    """Tokens and masks of what is trained on.

    Raises:
        UserError: a prompt has no label, or the tokenizer no end-of-sequence token.
    """
    labelled = [sample for sample in samples if isinstance(sample.prompt, str)]
    _add_labels(labelled, model, tokenizer)
    for sample in samples:
        if not isinstance(sample.prompt, str):
            _add_turns(sample, data, tokenizer)
        sample.status = Sample.Status.COMPLETED


def _add_turns(sample: Sample, data: Data, tokenizer: Any) -> None:
    """Tokens and mask of a conversation; the response begins with its first turn that is trained on."""
    assert isinstance(sample.prompt, list)
    kwargs = data.apply_chat_template_kwargs
    tools = sample.metadata.get(data.tool_key)
    tokens, mask = tokens_and_mask(sample.prompt, tokenizer, tools=tools, **kwargs)
    if 1 not in mask:
        raise UserError(
            f"prompt {sample.group_index}: it has no assistant message to train on; the messages come from"
            f" {', '.join(str(message['role']) for message in sample.prompt)}."
        )
    first = max(1, mask.index(1))
    sample.tokens, sample.loss_mask = tokens, mask[first:]
    sample.response_length = len(sample.loss_mask)
    sample.response = tokenizer.decode(tokens[first:])


def _add_labels(samples: list[Sample], model: Model, tokenizer: Any) -> None:
    """The label, and the end-of-sequence token, as the response; all of it is trained on."""
    if not samples:
        return
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {model.hf_checkpoint} has no end-of-sequence token to end a label with."
        )
    unlabelled = next((sample for sample in samples if not isinstance(sample.label, str)), None)
    if unlabelled is not None:
        raise UserError(f"--label-key: fine-tuning needs a text as label, and got {unlabelled.label!r}.")
    labels = encode([str(sample.label) for sample in samples], tokenizer)
    for sample, tokens in zip(samples, labels, strict=True):
        tokens = [*tokens, tokenizer.eos_token_id]
        sample.tokens = sample.tokens + tokens
        sample.response, sample.response_length = str(sample.label), len(tokens)
        sample.loss_mask = [1] * len(tokens)
