"""Fine-tuning's evaluation: the loss on the responses of the evaluation sets, which the trainer itself computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rltrain.arguments.config import Config
from rltrain.arguments.hf_config import ModelShape
from rltrain.data.batch import TrainBatch
from rltrain.data.tokenizer import load_tokenizer
from rltrain.megatron.device import device
from rltrain.megatron.training.forward_backward import forward_log_probs
from rltrain.megatron.training.share import RankShare
from rltrain.megatron.training.trained_model import TrainedModel
from rltrain.rollout.eval import eval_samples
from rltrain.rollout.sft_rollout import add_responses
from rltrain.schema import samples_to_table


class ValidationLoss:
    """The evaluation sets as batches, made once. All ranks call the methods together."""

    def __init__(self, config: Config, shape: ModelShape) -> None:
        """Read and tokenise the sets.

        Raises:
            UserError: a row has neither a label nor a conversation.
        """
        tokenizer = load_tokenizer(config.model.hf_checkpoint)
        # All of a set at once, as in one optimizer step.
        whole = replace(config, training=replace(config.training, num_steps_per_rollout=1))
        self._config, self._shape = whole, shape
        self._shares: dict[str, RankShare] = {}
        for settings in config.evaluation.eval_datasets:
            own = config.of_eval_set(settings)
            samples = eval_samples(own, settings | {"n_samples_per_eval_prompt": 1})
            add_responses(samples, own.data, own.model, tokenizer)
            table = samples_to_table(
                samples, step=0, attempt=0, dataset=settings["name"], rewards=[None] * len(samples),
                train_rewards=[0.0] * len(samples),
            )  # fmt: skip
            self._shares[settings["name"]] = RankShare(whole, shape, TrainBatch.from_arrow(table))

    def measure(self, policy: TrainedModel) -> dict[str, float]:
        """`eval/NAME/loss`: mean −log π of a set's trainable tokens in nats; `eval/NAME/tokens`: how many they are."""
        metrics: dict[str, float] = {}
        for name, share in self._shares.items():
            log_probs = share.per_token(
                lambda each: forward_log_probs(policy.wrapped, each, self._shape, self._config)
            )
            own = np.concatenate([np.empty(0, np.float32), *log_probs])
            sums = torch.tensor([-own.sum(dtype=np.float64), own.size], dtype=torch.float64, device=device())
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
            loss, tokens = sums.tolist()
            metrics |= {f"eval/{name}/loss": loss / max(1, tokens), f"eval/{name}/tokens": tokens}
        return metrics
