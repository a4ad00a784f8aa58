"""slime's `rollout_data`: what users' functions in the trainer find of this rank's samples, and what they may change.

One list a name, one tensor a response over all of its tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import Functions
from rltrain.data.batch import Flat
from rltrain.functions import load_function, takes
from rltrain.megatron.training.micro_batch import LossInputs, Responses
from rltrain.megatron.training.share import RankShare

BySample = dict[int, NDArray[np.float32]]

# Our names and slime's.
_NAMES = {
    "old_log_probs": "log_probs", "ref_log_probs": "ref_log_probs", "rollout_log_probs": "rollout_log_probs",
    "entropy": "entropy", "ref_entropy": "ref_entropy", "old_values": "values",
    "teacher_log_probs": "teacher_log_probs", "opd_reverse_kl": "opd_reverse_kl", "advantages": "advantages",
    "returns": "returns",
}  # fmt: skip
_FLAG = "--rollout-data-postprocess-path"


class RolloutData:
    """The lists of this rank's samples.

    Attributes:
        lists: by slime's names.
    """

    def __init__(self, share: RankShare, inputs: LossInputs[Flat], kl: BySample | None = None) -> None:
        batch, samples, cpu = share.batch, share.samples, torch.device("cpu")
        self._lengths = batch.response_lengths
        self._responses = {i: Responses.of(batch, [i], cpu) for i in samples}
        self.lists: dict[str, Any] = {
            "tokens": [torch.from_numpy(batch.tokens[i].astype(np.int64)) for i in samples],
            "rewards": [float(batch.train_rewards[i]) for i in samples],
            "response_lengths": [batch.response_lengths[i] for i in samples],
            "total_lengths": [len(batch.tokens[i]) for i in samples],
            "loss_masks": [self._responses[i].loss_masks[0] for i in samples],
        }
        values = inputs.given() | ({} if kl is None else {"kl": flat(kl, len(batch))})
        for name, own in values.items():
            if name in _NAMES or name == "kl":
                self.lists[_NAMES.get(name, name)] = [
                    response.expand(torch.from_numpy(own[i])) for i, response in self._responses.items()
                ]

    def taken(self, path: str | None, name: str) -> BySample:
        """A list that the function at `path` has set or changed, over trainable tokens.

        Raises:
            ValueError: it is missing, or has another shape, or a number that is not finite.
        """
        given = self.lists.get(name)
        if not isinstance(given, list) or len(given) != len(self._responses):
            raise ValueError(
                f"{path} must set rollout_data[{name!r}] to a list of {len(self._responses)} tensors, one per sample"
            )
        result = {}
        for (i, response), tensor in zip(self._responses.items(), given, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != (self._lengths[i],):
                raise ValueError(
                    f"{path}: the {name} of sample {i} must be a tensor of its {self._lengths[i]} response tokens"
                )
            result[i] = response.collapse(tensor.detach().float()).numpy()
            if not np.isfinite(result[i]).all():
                raise ValueError(f"{path}: one of the {name} of sample {i} is not finite")
        return result


def flat(by_sample: BySample, count: int) -> Flat:
    """The values of this rank's samples, and nothing for the other samples of a rollout of `count`."""
    empty = np.empty(0, np.float32)
    return [by_sample.get(i, empty) for i in range(count)]


def post_processes(functions: Functions) -> bool:
    """Whether --rollout-data-postprocess-path is for the trainer: it takes (args, rollout_id, rollout_data)."""
    path = functions.rollout_data_postprocess_path
    return bool(path) and not takes(load_function(path, flag=_FLAG), 2)


def post_processed(
    config: Config, share: RankShare, inputs: LossInputs[Flat], rollout_id: int
) -> LossInputs[Flat]:
    """The inputs as that function leaves them: it may change everything that has one value a token.

    Raises:
        ValueError: it has changed the loss masks, or given something another shape.
    """
    if not post_processes(config.functions):
        return inputs
    path = config.functions.rollout_data_postprocess_path
    data = RolloutData(share, inputs)
    masks = [mask.clone() for mask in data.lists["loss_masks"]]
    load_function(path, flag=_FLAG)(config.namespace, rollout_id, data.lists)
    given = data.lists["loss_masks"]
    if len(given) != len(masks) or not all(map(torch.equal, given, masks)):
        raise ValueError(
            f"{_FLAG} {path} has changed loss_masks after they were used to divide the batch: change them in a"
            " function of (args, groups), which runs earlier."
        )
    names = [name for name in inputs.given() if name in _NAMES]
    changed = {name: flat(data.taken(path, _NAMES[name]), len(share.batch)) for name in names}
    return replace(inputs, **changed)
