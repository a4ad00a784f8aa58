"""A rollout function that generates nothing: supervised fine-tuning on the labels.

`--rollout-function-path rltrain.rollout.sft_rollout.generate_rollout --loss-type sft_loss`, without engines
(`--debug-train-only`). The response of each prompt is its label, ended by the end-of-sequence token.
"""

from __future__ import annotations

import argparse

from rltrain.arguments.errors import UserError
from rltrain.data.source import RolloutDataSource
from rltrain.data.tokenizer import encode, load_tokenizer
from rltrain.rollout.base_types import RolloutFnTrainOutput
from rltrain.sample import Sample


def generate_rollout(
    args: argparse.Namespace, rollout_id: int, data_source: RolloutDataSource, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """The next `--rollout-batch-size` prompts with their labels; all label tokens are trained on.

    Raises:
        UserError: a prompt has no label, the tokenizer no end-of-sequence token, or an evaluation was asked for.
    """
    if evaluation:
        raise UserError("fine-tuning has no engines that could be evaluated: leave --eval-interval out.")
    tokenizer = load_tokenizer(args.hf_checkpoint)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {args.hf_checkpoint} has no end-of-sequence token to end a label with."
        )
    groups = data_source.get_samples(args.rollout_batch_size)
    samples = [sample for group in groups for sample in group]
    unlabelled = next((sample for sample in samples if not isinstance(sample.label, str)), None)
    if unlabelled is not None:
        raise UserError(f"--label-key: fine-tuning needs a text as label, and got {unlabelled.label!r}.")
    labels = encode([str(sample.label) for sample in samples], tokenizer)
    for sample, tokens in zip(samples, labels, strict=True):
        tokens = [*tokens, tokenizer.eos_token_id]
        sample.tokens = sample.tokens + tokens
        sample.response, sample.response_length = str(sample.label), len(tokens)
        sample.loss_mask = [1] * len(tokens)
        sample.status = Sample.Status.COMPLETED
    return RolloutFnTrainOutput(groups)
