"""Block FP8, for engines that compute with it: each block of a weight has a scale of its own.

As in DeepSeek-V3: https://arxiv.org/abs/2412.19437, section 3.3. The names are those of its Hugging Face directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rltrain.models.quantised import SCALE_SUFFIX
from rltrain.weights.buckets import NamedTensor

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


@dataclass(frozen=True)
class BlockFp8:
    """What a model directory has in block FP8.

    Attributes:
        block: Rows and columns of a block.
        names: Of the weights that are quantised; all others stay as they are.
    """

    block: tuple[int, int]
    names: frozenset[str]

    @classmethod
    def of(cls, block: tuple[int, int], tensors: Collection[str]) -> BlockFp8:
        """The form of a directory with these tensors: a weight is quantised if there are scales of it."""
        return cls(block, frozenset(name for name in tensors if f"{name}{SCALE_SUFFIX}" in tensors))

    def quantised(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        """The tensors, each quantised one followed by its scales."""
        for name, tensor in tensors:
            if name not in self.names:
                yield name, tensor
                continue
            values, scales = quantise(tensor, self.block)
            yield name, values
            yield f"{name}{SCALE_SUFFIX}", scales


@torch.no_grad()
def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight in block FP8: values, and what each block of them is multiplied by.

    Args:
        weight: [rows, columns], of any float type.
        block: Rows and columns of a block; those at the edges may be smaller.

    Returns:
        float8_e4m3fn [rows, columns], and fp32 [blocks of rows, blocks of columns].
    """
    (rows, columns), (height, width) = weight.shape, block
    padded = F.pad(weight.detach().float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)  # a block of zeros has any scale
    values = (blocks / scales[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).to(_FP8)
    return values.view(padded.shape)[:rows, :columns].contiguous(), scales
