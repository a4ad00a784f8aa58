"""Samples of the runs that `analysis.demo_data` writes."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.demo.text import HOSTILE, Reply, direct_reply, encode, question, tool_reply
from rltrain.sample import Sample
from rltrain.schema import TRAINER_SCHEMA, samples_to_table


@dataclass(frozen=True)
class Behaviour:
    """How a demo model changes over its training.

    Attributes:
        speed: steepness of the learning curve.
        filler: idle sentences in an answer at the end of training.
        collapse: whether its entropy goes to nearly nothing.
        drift: how much the log-prob gap to the engine grows, in nats.
    """

    speed: float
    filler: int = 0
    collapse: bool = False
    drift: float = 0.0

    def honest(self) -> Behaviour:
        """The behaviour of the same model where idle sentences earn nothing."""
        return replace(self, speed=self.speed / 3) if self.filler else self


@dataclass(frozen=True)
class Batch:
    """Samples with what the trainer saw of them, token by token."""

    samples: list[Sample]
    trainer_log_probs: list[list[float]]
    trainer_entropies: list[list[float]]
    metrics: dict[str, float]

    @property
    def entropy(self) -> float:
        """Mean over all tokens, nats."""
        return statistics.fmean(value for values in self.trainer_entropies for value in values)

    @property
    def gap_mean(self) -> float:
        """Mean |trainer - engine| over all tokens, nats."""
        return statistics.fmean(self._gaps())

    @property
    def gap_max(self) -> float:
        """Largest |trainer - engine|, nats."""
        return max(self._gaps())

    def _gaps(self) -> list[float]:
        pairs = zip(self.samples, self.trainer_log_probs, strict=True)
        return [
            abs(ours - theirs)
            for sample, values in pairs
            for ours, theirs, mask in zip(
                values, sample.rollout_log_probs or [], sample.loss_mask or [], strict=True
            )
            if mask
        ] or [0.0]


def make_samples(
    rng: random.Random, behaviour: Behaviour, done: float, step: int, groups: int, group_size: int, limit: int
) -> Batch:
    """`groups` × `group_size` samples of a model that is `done` (0 to 1) with its training."""
    samples = []
    for group in range(groups):
        difficulty = 1 + group % 3
        prompt, result = question(rng, difficulty)
        for i in range(group_size):
            reply, answer = _reply(rng, behaviour, done, prompt, result, difficulty, tool=group % 4 == 3)
            sample = _sample(rng, behaviour, done, reply, prompt, result, limit)
            sample.group_index = step * groups + group
            sample.index = sample.group_index * group_size + i
            sample.metadata = {"difficulty": difficulty}
            sample.weight_versions = [str(step)] * sum(trained for _, trained in reply.pieces)
            correct = float(answer == result)
            longer = 0.5 * done * (behaviour.filler > 0)
            sample.reward = min(1.0, correct + longer)
            if sample.index % 97 == 45:
                sample.status, sample.failure, sample.reward = (
                    Sample.Status.FAILED,
                    "reward: timed out after 30 s",
                    0.0,
                )
                sample.loss_mask = [0] * sample.response_length
            samples.append(sample)
    noise = 1e-6 + behaviour.drift * done
    engine = [sample.rollout_log_probs or [] for sample in samples]
    trainer = [[min(0.0, value + rng.gauss(0, noise)) for value in values] for values in engine]
    entropies = [[max(0.0, -value * rng.uniform(0.5, 1.5)) for value in values] for values in engine]
    return Batch(samples, trainer, entropies, _metrics(samples, group_size))


def _reply(
    rng: random.Random,
    behaviour: Behaviour,
    done: float,
    prompt: str,
    result: int,
    difficulty: int,
    *,
    tool: bool,
) -> tuple[Reply, int]:
    skill = 0.95 / (1 + math.exp(-behaviour.speed * (done - 0.2 - 0.12 * difficulty)))
    correct = rng.random() < (max(skill, 0.5) if tool else skill)
    answer = result if correct else result + rng.choice([-10, -1, 1, 10])
    if tool:
        return tool_reply(prompt, result, answer), answer
    filler = rng.randint(0, 2) + round(behaviour.filler * done * rng.uniform(0.5, 1.5))
    reply = direct_reply(answer, filler)
    if rng.random() < 0.01:
        reply.pieces.append((HOSTILE, True))
    return reply, answer


def _sample(
    rng: random.Random, behaviour: Behaviour, done: float, reply: Reply, prompt: str, result: int, limit: int
) -> Sample:
    sample = Sample(
        prompt=[{"role": "system", "content": "Add the numbers."}, {"role": "user", "content": prompt}],
        tokens=encode(f"Add the numbers.<|end|><|user|>{prompt}<|end|><|assistant|>"),
        response=reply.text,
        label=str(result),
        status=Sample.Status.COMPLETED,
        reward_seconds=0.002,
    )
    spread = 0.4 * (1 - done) + (0.005 if behaviour.collapse else 0.15)
    for text, trained in reply.pieces:
        tokens = encode(text)[: limit - sample.response_length]
        log_probs = [-rng.expovariate(1 / spread) for _ in tokens] if trained else None
        sample.append_response_tokens(tokens=tokens, log_probs=log_probs, trainable=trained)
    if sample.response_length == limit:
        sample.status = Sample.Status.TRUNCATED
    sample.generate_seconds = 0.03 * sample.response_length
    return sample


def _metrics(samples: list[Sample], group_size: int) -> dict[str, float]:
    rewards = _rewards(samples)
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    lengths = [sample.response_length for sample in samples]
    statuses = [sample.status for sample in samples]
    return {
        "rollout/reward": statistics.fmean(rewards),
        "rollout/response_length": statistics.fmean(lengths),
        "rollout/response_length_max": max(lengths),
        "rollout/truncated_ratio": statuses.count(Sample.Status.TRUNCATED) / len(samples),
        "rollout/failed_ratio": statuses.count(Sample.Status.FAILED) / len(samples),
        "rollout/zero_std_ratio": sum(len(set(group)) == 1 for group in groups) / len(groups),
        "rollout/tokens": sum(lengths),
    }


def _rewards(samples: list[Sample]) -> list[float]:
    return [float(sample.reward) for sample in samples]  # type: ignore[arg-type]


def write_samples(directory: Path, batch: Batch, step: int, attempt: int, dataset: str) -> None:
    """Write the Parquet file of a step (or of an evaluation)."""
    rewards = _rewards(batch.samples)
    table = samples_to_table(batch.samples, step=step, attempt=attempt, dataset=dataset, rewards=list(rewards),
                             train_rewards=_train_rewards(batch))  # fmt: skip
    _write(table, directory)


def write_trainer(directory: Path, batch: Batch, step: int, attempt: int) -> None:
    """Write what the trainer saw of a step."""
    advantages = zip(batch.samples, _train_rewards(batch), strict=True)
    columns = {
        "step": [step] * len(batch.samples),
        "attempt": [attempt] * len(batch.samples),
        "index": [sample.index for sample in batch.samples],
        "trainer_log_probs": batch.trainer_log_probs,
        "trainer_entropies": batch.trainer_entropies,
        "advantages": [[value] * sample.response_length for sample, value in advantages],
    }
    _write(pa.table(columns, schema=TRAINER_SCHEMA), directory)


def _write(table: pa.Table, directory: Path) -> None:
    directory.mkdir(parents=True)
    pq.write_table(table, directory / "part-0.parquet", compression="zstd")


def _train_rewards(batch: Batch) -> list[float]:
    """The rewards, normalised within each group."""
    rewards = _rewards(batch.samples)
    by_group: dict[int | None, list[float]] = {}
    for sample, reward in zip(batch.samples, rewards, strict=True):
        by_group.setdefault(sample.group_index, []).append(reward)
    return [
        _normalised(reward, by_group[sample.group_index])
        for sample, reward in zip(batch.samples, rewards, strict=True)
    ]


def _normalised(reward: float, group: list[float]) -> float:
    if len(group) < 2:
        return 0.0
    return (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
