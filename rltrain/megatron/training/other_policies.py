"""Policies beside the one that is trained, and their log-probs: the reference, a teacher, the one that generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from rltrain.arguments.config import Config
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.hf_config import ModelShape
from rltrain.data.batch import Flat
from rltrain.megatron.checkpoint.load import load_checkpoint
from rltrain.megatron.checkpoint.resume import load_source, matching, reference_source, teacher_source
from rltrain.megatron.checkpoint.save import SaveOptions, save_checkpoint
from rltrain.megatron.checkpoint.state import TrainState
from rltrain.megatron.model.host_copy import PastPolicies, SavedWeights
from rltrain.megatron.training.micro_batch import LossInputs
from rltrain.megatron.training.rollout_data import post_processes
from rltrain.megatron.training.share import RankShare
from rltrain.run.timing import Timers

LogProbs = Callable[[RankShare, str], tuple[Flat, Flat | None]]  # and the entropy, with --use-rollout-entropy


class OtherPolicies:
    """Those that the flags ask for; all have the model's shape, and use the model itself to compute.

    Attributes:
        reference: For the KL terms.
        teacher: For on-policy distillation.
        past: For --keep-old-actor.
    """

    def __init__(self, config: Config, shape: ModelShape, models: list[GPTModel]) -> None:
        """Load them, one after the other, into a model whose own weights are loaded later.

        Raises:
            UserError: a flag names a directory that holds no weights.
        """
        self._config, self._models = config, models
        self.reference = self.teacher = self.past = None
        if config.algorithm.loss_type == "sft_loss":
            return
        if config.algorithm.use_kl_loss or config.algorithm.kl_coef:
            load_source(models, shape, reference_source(config.checkpoint, config.model), is_trained=False)
            self.reference = SavedWeights(models)
        if config.algorithm.opd_teacher_load:
            load_source(models, shape, teacher_source(config.algorithm), is_trained=False)
            self.teacher = SavedWeights(models)
        if config.algorithm.keep_old_actor:
            self.past = PastPolicies(config.rollout.max_staleness)

    def add_log_probs(
        self,
        inputs: LossInputs[Flat],
        share: RankShare,
        log_probs: LogProbs,
        rollout_id: int,
        timers: Timers,
    ) -> LossInputs[Flat]:
        """The inputs with the log-probs (and entropies) of these and the old ones, as far as the flags need them.

        Args:
            log_probs: Computes those of the weights that the models have then; it is given slime's prefix too.
        """
        algorithm, models = self._config.algorithm, self._models
        reference = teacher = old = entropy = ref_entropy = None
        if self.reference is not None:
            with timers("ref_log_probs"), self.reference.in_place_of(models):
                reference, ref_entropy = log_probs(share, "ref_")
        if self.teacher is not None:
            with timers("teacher_log_probs"), self.teacher.in_place_of(models):
                teacher, _ = log_probs(share, "teacher_")
        elif share.batch.teacher_log_probs is not None:
            teacher = share.trainable.select(share.batch.teacher_log_probs)
        past = self.past.that_generated(rollout_id) if self.past is not None else None
        if past is not None and not algorithm.use_rollout_logprobs:
            with timers("log_probs"), past.in_place_of(models):
                old, entropy = log_probs(share, "")
        elif _needs_own_log_probs(algorithm, self._config.functions, share.num_steps):
            with timers("log_probs"):
                old, entropy = log_probs(share, "")
        return replace(
            inputs,
            ref_log_probs=reference,
            teacher_log_probs=teacher,
            old_log_probs=inputs.rollout_log_probs if algorithm.use_rollout_logprobs else old,
            entropy=entropy,
            ref_entropy=ref_entropy,
        )

    def after_rollout(self, rollout_id: int) -> None:
        """Every --ref-update-interval rollouts the reference becomes what the policy is now."""
        interval = self._config.algorithm.ref_update_interval
        if interval and self.reference is not None and (rollout_id + 1) % interval == 0:
            self.reference.take(self._models)

    def save(self, iteration: int) -> None:
        """Write the reference, where it is no longer what the run started with."""
        directory = self._directory()
        if directory is not None and self.reference is not None:
            with self.reference.in_place_of(self._models):
                options = SaveOptions.of_companion(self._config.checkpoint)
                save_checkpoint(directory, iteration, TrainState(self._models), options)

    def resume(self, iteration: int) -> None:
        """Take up the reference that belongs to the policy's checkpoint.

        Raises:
            UserError: there is none of that step.
        """
        directory = self._directory()
        if not iteration or directory is None or self.reference is None:
            return
        checkpoint = matching(directory, iteration)
        with self.reference.in_place_of(self._models):
            load_checkpoint(checkpoint, TrainState(self._models))
            self.reference.take(self._models)

    def _directory(self) -> Path | None:
        save = self._config.checkpoint.save
        return Path(save) / "reference" if save and self._config.algorithm.ref_update_interval else None


def check_rollout(algorithm: Algorithm, share: RankShare) -> None:
    """See that a rollout brings what the flags need of it.

    Raises:
        ValueError: names the flag and what is missing.
    """
    needs_engine = {"--use-tis": algorithm.use_tis, "--use-rollout-logprobs": algorithm.use_rollout_logprobs,
                    "--get-mismatch-metrics": algorithm.get_mismatch_metrics}  # fmt: skip
    for flag, given in needs_engine.items():
        if given and share.batch.rollout_log_probs is None:
            raise ValueError(f"{flag}, but the rollout has no log-probs")
    if algorithm.use_rollout_routing_replay and share.routes is None:
        raise ValueError(
            "--use-rollout-routing-replay, but the samples have no routes: a generation function has to ask for them"
            " (return_routed_experts) and to hand the answer's meta_info to Sample.append_response_tokens"
        )
    if algorithm.opd_type == "sglang" and share.batch.teacher_log_probs is None:
        raise ValueError(
            "--opd-type sglang, but the samples have no teacher_log_probs: the reward function or the generate"
            " function has to set them, one per response token"
        )


def _needs_own_log_probs(algorithm: Algorithm, functions: Functions, num_steps: int) -> bool:
    """Whether something asks for the policy's log-probs, or entropy, before the first optimizer step."""
    if algorithm.use_rollout_logprobs:
        return algorithm.use_rollout_entropy
    return bool(
        num_steps > 1
        or algorithm.use_rollout_entropy
        or algorithm.kl_coef
        or functions.custom_advantage_function_path
        or algorithm.use_opd
        or algorithm.loss_type == "custom_loss"
        or post_processes(functions)
    )
