"""Gated delta nets, https://arxiv.org/abs/2412.06464, over packed sequences, in plain torch on every device.

Each head keeps a matrix S, which a token first lets decay and then corrects by what its key reads wrongly; its query
reads the result:

    S ← α S,   S ← S + k ⊗ β (v − S k),   o = S q

Megatron-core's own layer needs kernels for GPUs, and takes no packed sequences in all versions that are supported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from rltrain.megatron.model.attention import PackedSequences
from rltrain.models.linear import CHUNK, LinearAttention

_EPS = 1e-6  # of the lengths that queries and keys are divided by; the engines' and transformers'
_DECAYS = (0.01, 16.0)  # of random weights
_SPLIT = {"convolution": 0, "A_log": 0, "dt_bias": 0}  # over tensor parallel ranks


@dataclass(frozen=True)
class DeltaNetSubmodules:
    """The kinds of linear layer."""

    in_proj: Any
    out_proj: Any


class GatedDeltaNet(MegatronModule):
    """A layer's attention. Tensor parallel ranks have their key heads, with the values of these."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaNetSubmodules,
        layer_number: int,
        *,
        sizes: LinearAttention,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,  # of Megatron-core's interface: names and communication types
    ) -> None:
        super().__init__(config=config)
        assert config.init_method is not None and config.output_layer_init_method is not None
        self.sizes, self.tp_group = sizes, pg_collection.tp
        values = sizes.value_heads * sizes.value_size
        common: dict[str, Any] = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = submodules.in_proj(
            config.hidden_size, sizes.key_heads * sum(sizes.group), init_method=config.init_method,
            gather_output=False, skip_bias_add=False, tp_comm_buffer_name="fc1", **common,
        )  # fmt: skip
        self.out_proj = submodules.out_proj(
            values, config.hidden_size, init_method=config.output_layer_init_method,
            input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="fc2", **common,
        )  # fmt: skip
        convolution = torch.empty(sizes.key_heads * sum(sizes.group[:3]), 1, sizes.kernel)
        config.init_method(convolution)
        self.convolution = self._own(convolution)
        self.A_log = self._own(torch.empty(sizes.value_heads).uniform_(*_DECAYS).log())
        self.dt_bias = self._own(torch.ones(sizes.value_heads))
        self.out_norm = torch.nn.Parameter(self._placed(torch.ones(sizes.value_size)))

    def _placed(self, weight: Tensor) -> Tensor:
        device = "cpu" if self.config.use_cpu_initialization else "cuda"
        return weight.to(device, self.config.params_dtype)

    def _own(self, whole: Tensor) -> torch.nn.Parameter:
        """This rank's rows of a weight that is split."""
        rows = whole.chunk(self.tp_group.size())[self.tp_group.rank()].clone()
        weight = torch.nn.Parameter(self._placed(rows))
        set_tensor_model_parallel_attributes(weight, True, 0, 1)
        return weight

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The output of [tokens, 1, hidden], and no bias."""
        if packed_seq_params is None or packed_seq_params.calls is not None:
            raise ValueError("this attention takes whole packed sequences only")
        places = find_places(packed_seq_params.lengths, self.sizes.kernel, hidden_states.device)
        projected = self.in_proj(hidden_states)[0].squeeze(1)
        by_head = projected.unflatten(-1, (-1, sum(self.sizes.group)))
        convolved = sum(self.sizes.group[:3])
        mixed, gate, beta, decay = by_head.split([convolved, *self.sizes.group[3:]], dim=-1)
        mixed = F.silu(convolve(mixed.flatten(1), self.convolution, places)).view_as(mixed)
        query, key, value = mixed.split(self.sizes.group[:3], dim=-1)
        # Of these, heads of values are a key head's ones after another.
        value, gate = (each.reshape(len(each), -1, self.sizes.value_size) for each in (value, gate))
        beta = beta.flatten(1).sigmoid()
        decay = -self.A_log.float().exp() * F.softplus(decay.flatten(1).float() + self.dt_bias.float())
        output = delta_rule(query, key, value, beta, decay, places)
        return self.out_proj(self._gated_norm(output, gate).flatten(1).unsqueeze(1))[0], None

    def _gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        """RMSNorm of each head, [tokens, heads, value_size], times SiLU of its gate."""
        # Its gradient is summed over tensor parallel ranks, each of which has other heads.
        weight = copy_to_tensor_model_parallel_region(self.out_norm, group=self.tp_group)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.config.layernorm_epsilon).to(x.dtype)
        return ((weight * normed).float() * F.silu(gate.float())).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For checkpoints: which weights are split over tensor parallel ranks."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        split = {name: getattr(self, name) for name in _SPLIT}
        return sharded | make_sharded_tensors_for_checkpoint(split, prefix, _SPLIT, sharded_offsets)


@dataclass(frozen=True)
class Places:
    """Where tokens of packed sequences lie, for what a sequence must not see of the one before it.

    Attributes:
        before: For the convolution: of each place the token, with the number of tokens, which stands for zeros, a few
            times before every sequence.
        after: The places of its outputs.
        chunks: [chunks, CHUNK]: the tokens of each chunk of a sequence, zeros behind its end. First come the first
            chunks of all sequences, the longest first, then their second ones, and so on.
        in_chunks: Of each token its place there.
        running: How many sequences have a first chunk, a second one, and so on.
    """

    before: Tensor
    after: Tensor
    chunks: Tensor
    in_chunks: Tensor
    running: tuple[int, ...]


@lru_cache(maxsize=2)  # all layers of a model ask for the same ones
def find_places(lengths: tuple[int, ...], kernel: int, device: torch.device) -> Places:
    """The places of sequences of `lengths` tokens, for a convolution over `kernel` tokens."""
    total, sizes = sum(lengths), np.array(lengths)
    starts = np.cumsum(sizes) - sizes
    before = np.insert(np.arange(total), np.repeat(starts, kernel - 1), total)
    after = np.arange(total) + np.repeat(np.arange(len(sizes)) * (kernel - 1), sizes)
    order = np.argsort(-sizes, kind="stable")
    counts = -(-sizes // CHUNK)
    running = tuple(int((counts > i).sum()) for i in range(counts.max()))
    chunks = np.full((sum(running), CHUNK), total)
    row = 0
    for step, count in enumerate(running):
        for sequence in order[:count]:
            first, end = starts[sequence] + step * CHUNK, starts[sequence] + sizes[sequence]
            tokens = np.arange(first, min(first + CHUNK, end))
            chunks[row, : len(tokens)] = tokens
            row += 1
    in_chunks = np.empty(total + 1, dtype=np.int64)
    in_chunks[chunks.ravel()] = np.arange(chunks.size)
    arrays = (before, after, chunks, in_chunks[:-1])
    on_device = [torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in arrays]
    return Places(on_device[0], on_device[1], on_device[2], on_device[3], running)


def convolve(x: Tensor, weight: Tensor, places: Places) -> Tensor:
    """Each channel's sum over the last few tokens of its own sequence.

    Args:
        x: [tokens, channels].
        weight: [channels, 1, kernel]; the last one is the token's own.
    """
    padded = F.pad(x, (0, 0, 0, 1)).index_select(0, places.before)
    summed = F.conv1d(padded.t().unsqueeze(0), weight, groups=len(weight))
    return summed.squeeze(0).t().index_select(0, places.after)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor, places: Places
) -> Tensor:
    """What queries read, [tokens, value heads, value_size], in the type of `query`; computed in fp32.

    Within a chunk all corrections follow from one triangular system; only the heads' matrices go from chunk to chunk.

    Args:
        query, key: [tokens, key heads, key_size]; each key head is that of as many value heads, one after another.
        value: [tokens, value heads, value_size].
        beta: How far a token corrects, [tokens, value heads].
        decay: log α, [tokens, value heads], fp32.
    """
    kind, shared = query.dtype, value.shape[1] // query.shape[1]
    query, key = (_unit(each.float()).repeat_interleave(shared, dim=1) for each in (query, key))
    q, k, v, b, a = (_in_chunks(each, places) for each in (
        query / math.sqrt(query.shape[-1]), key, value, beta.unsqueeze(-1), decay.unsqueeze(-1)
    ))  # fmt: skip
    a = a.cumsum(dim=2)  # of the decays since the chunk began
    apart = (a - a.mT).masked_fill(_ahead(a), -math.inf).exp()  # between a token and an earlier one
    system = (b * (k @ k.mT) * apart).tril(-1)
    rest = torch.linalg.solve_triangular(
        system, torch.cat([b * v, b * k * a.exp()], dim=-1), upper=False, unitriangular=True
    )
    corrections, read = rest.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * apart
    of_state, into_state = q * a.exp(), (k * (a[:, :, -1:] - a).exp()).mT
    kept = a[:, :, -1:].exp()
    state = v.new_zeros(places.running[0], v.shape[1], k.shape[-1], v.shape[-1])
    outputs = []
    parts = zip(
        *(each.split(places.running) for each in (corrections, read, scores, of_state, into_state, kept)),
        strict=True,
    )
    for new, seen, score, reads, writes, share in parts:
        state = state[: len(new)]
        new = new - seen @ state
        outputs.append(reads @ state + score @ new)
        state = share * state + writes @ new
    by_place = torch.cat(outputs).transpose(1, 2).flatten(0, 1)
    return by_place.index_select(0, places.in_chunks).to(kind)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)


def _in_chunks(x: Tensor, places: Places) -> Tensor:
    """[tokens, heads, size] as [chunks, heads, CHUNK, size] in fp32, with zeros where no token is."""
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, 1))
    chunks = padded.index_select(0, places.chunks.flatten()).unflatten(0, places.chunks.shape)
    return chunks.transpose(1, 2)


def _ahead(x: Tensor) -> Tensor:
    """[CHUNK, CHUNK]: where the second token comes after the first."""
    return torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
