"""Functions that a user might bring, good and bad ones; `calls` notes what they were given."""

from __future__ import annotations

import asyncio

from rltrain.data.source import RolloutDataSource
from rltrain.rollout.filters import DynamicFilterOutput
from rltrain.sample import Sample

calls = []


async def generate(args, sample, sampling_params):
    """Odd samples end at once with reward 1, even ones with 0."""
    sample.append_response_tokens(tokens=[4, 5], log_probs=[-1.0, -2.0])
    sample.response, sample.reward = "ab", float(sample.index % 2)
    sample.status = sample.Status.COMPLETED
    return sample


async def slow_second(args, sample, sampling_params):
    if sample.group_index % 2:
        await asyncio.sleep(60)
    return await generate(args, sample, sampling_params)


def every_third(args, samples, **kwargs):
    calls.append(("filter", [sample.index for sample in samples]))
    number = samples[0].group_index
    return DynamicFilterOutput(number % 3 == 0, None if number % 3 == 0 else f"mod_{number % 3}")


def falls_back(args, samples):
    calls.append(samples[0].group_index)
    number = samples[0].group_index
    return DynamicFilterOutput(number % 3 == 0, "other", keep_when_insufficient=True)


def tensor_bool(args, samples):
    import torch

    return DynamicFilterOutput(torch.tensor(samples[0].group_index != 1), "one")


def in_the_trainer(args, rollout_id, rollout_data):
    raise AssertionError("the rollout process must not call it")


def drops_all(args, samples):
    return DynamicFilterOutput(False, "never")


def plain_bool(args, samples):
    return samples[0].group_index != 1


def strange_filter(args, samples):
    return "yes"


def newest(args, rollout_id, buffer, num_samples):
    taken = buffer[-num_samples:]
    del buffer[-num_samples:]
    return taken


def too_many(args, rollout_id, buffer, num_samples):
    return list(buffer)


def remove_first(args, groups):
    for group in groups:
        group[0].remove_sample = True


def all_samples(args, samples, data_source):
    calls.append(("all", [group[0].group_index for group in samples], data_source))


def hook(args, sample, *, rollout_id=None):
    sample.metadata["hook"] = rollout_id


async def async_hook(args, sample, evaluation):
    sample.metadata["async_hook"] = [evaluation, sample.reward]
    return sample


def bad_hook(args, sample):
    if sample.index == 3:
        raise KeyError("in the hook")
    if sample.index == 4:
        return {"sample": sample}
    return None


def postprocess(args, samples):
    for group in samples:
        group[1].loss_mask = [0, 1]


def double(args, samples):
    raw = [sample.reward for sample in samples]
    return raw, [2 * value for value in raw]


def one_short(args, samples):
    return [0.0] * len(samples), [0.0] * (len(samples) - 1)


def not_a_number(args, samples):
    return [0.0] * len(samples), [float("nan")] * len(samples)


def first_three(args, samples):
    samples = samples[:3]
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [7.0, 8.0, 9.0],
        "raw_reward": [1.0, 2.0, 3.0],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [[1, 0]] * 3,
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }


def ragged(args, samples):
    return first_three(args, samples) | {"loss_masks": [[1, 0], [1], [1, 1]]}


def lacks_rewards(args, samples):
    data = first_three(args, samples)
    del data["rewards"]
    return data


def log(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    rollout_extra_metrics["mine"] = float(len(samples))
    return rollout_id == 1


def eval_log(rollout_id, args, data, extra_metrics):
    extra_metrics["eval/mine"] = float(len(data["dev"]["samples"]))
    return rollout_id == 1


class Reversed(RolloutDataSource):
    def get_samples(self, num_samples):
        return super().get_samples(num_samples)[::-1]


async def group_reward(args, samples):
    assert all(sample.response for sample in samples)
    return [float(i) for i in range(len(samples))]


def bad_group_reward(args, samples):
    return [1.0]


def two_arguments_too_many(args, samples, extra, more): ...


def no_rollout_id(args): ...


def sync_generate(args, sample, sampling_params): ...


async def async_filter(args, groups):
    remove_first(args, groups)


def breaks_a_mask(args, samples):
    samples[1][0].loss_mask = [1]


def evaluate(args, rollout_id, data_source, evaluation=False):
    assert evaluation
    sample = Sample(index=0, tokens=[1, 2], response_length=1, reward=1.0, status=Sample.Status.COMPLETED)
    return {"own": {"rewards": [1.0] * (1 + rollout_id % 2), "samples": [sample], "truncated": [False]}}


def evaluate_ragged(args, rollout_id, data_source, evaluation=False):
    result = evaluate(args, rollout_id, data_source, evaluation)
    result["own"]["samples"][0].rollout_log_probs = [-1.0, -1.0]
    return result
