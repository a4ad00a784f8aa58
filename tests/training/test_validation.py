"""The loss of fine-tuning on its evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.megatron import init_single_process, make_actor

from rltrain import arguments
from rltrain.data.batch import TrainBatch
from rltrain.run.errors import UserError
from rltrain.validation import ValidationLoss

pytestmark = pytest.mark.slow


def sft_config(model: Path, prompts: Path, *flags: str) -> Any:
    words = (
        f"--hf-checkpoint {model} --prompt-data {prompts} --label-key label --rollout-batch-size 20 --num-rollout 2"
        f" --loss-type sft_loss --calculate-per-token-loss --lr 0.05 --eval-interval 1 --eval-prompt-data dev {prompts}"
    )
    return arguments.parse([*words.split(), *flags])


def test_it_is_the_loss_that_training_has_on_the_same_rows(
    tiny_model: Path, prompt_file: Path, tmp_path: Path
) -> None:
    init_single_process()
    config = sft_config(tiny_model, prompt_file)
    actor = make_actor(config, tmp_path)
    loss = ValidationLoss(config, actor.shape)
    rows = [json.loads(line) for line in prompt_file.read_text().splitlines()]
    before = loss.measure(actor.policy)
    assert before["eval/dev/tokens"] == sum(
        len(row["label"]) + 1 for row in rows
    )  # a token a character, and <eos>

    batch = TrainBatch(
        tokens=[tokens for share in loss._shares.values() for tokens in share.batch.tokens],
        response_lengths=[len(row["label"]) + 1 for row in rows],
        loss_masks=[mask for share in loss._shares.values() for mask in share.batch.loss_masks],
        train_rewards=next(iter(loss._shares.values())).batch.train_rewards,
        rollout_log_probs=None,
    )
    assert actor.train(0, batch)["train/loss"] == pytest.approx(before["eval/dev/loss"], rel=1e-5)
    assert loss.measure(actor.policy)["eval/dev/loss"] < before["eval/dev/loss"]


def test_only_fine_tuning_is_evaluated_without_engines(tiny_model: Path, prompt_file: Path) -> None:
    config = sft_config(tiny_model, prompt_file)
    assert config.debug.debug_train_only and config.evaluation.eval_datasets
    with pytest.raises(UserError, match="Only --loss-type sft_loss is evaluated without"):
        sft_config(tiny_model, prompt_file, "--loss-type", "policy_loss", "--debug-train-only")
