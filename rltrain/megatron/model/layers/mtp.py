"""The layer that predicts the token after the next, from the model's own output (MTP, arXiv 2412.19437, 2.2).

At token i it is given the model's output there and the embedding of token i + 1, and predicts token i + 2. It is a
transformer layer like the model's, between norms and the model's embedding and output layer. The model's output,
embedding and output layer are constants to it and get no gradients, so training it changes nothing else.

Megatron-core's own does not fit. 0.16 takes labels in every forward pass, returns a loss and no logits, and trains the
whole model with it. 0.19 computes logits of every token, and averages over each micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rltrain.arguments.hf_config import ModelShape
from rltrain.megatron.model.attention import PackedSequences
from rltrain.megatron.model.layers.latent import WholeLinear
from rltrain.megatron.model.specs import decoder_spec

_NAME = "mtp_head"
_EXPECTED = "has_mtp_head"  # of every chunk of a model whose last one has a head


class MtpHead(MegatronModule):
    """The layer, on the last pipeline stage.

    Attributes:
        scale: What its loss is multiplied by.
        vocab_size: Columns of its logits that exist.
        chunk_size: Positions whose log-probs are computed at a time.
        embedding: [rows of this rank, hidden size], what `lent_embedding` lends.
    """

    def __init__(
        self, shape: ModelShape, model_config: TransformerConfig, scale: float, chunk_size: int
    ) -> None:
        config = _of_one_layer(model_config)
        super().__init__(config=config)
        assert shape.head is not None
        self.scale, self.vocab_size, self.chunk_size = scale, shape.vocab_size, chunk_size
        self._hidden_first = shape.head.hidden_first
        size, eps = config.hidden_size, config.layernorm_epsilon
        block = decoder_spec(config, family=shape.family)
        norm: Any = block.layer_norm
        assert block.layer_specs
        self.token_norm = norm(config=config, hidden_size=size, eps=eps)
        self.hidden_norm = norm(config=config, hidden_size=size, eps=eps)
        self.projection = WholeLinear(2 * size, size, config=config, init_method=config.init_method)
        self.layer = build_module(block.layer_specs[0], config=config, layer_number=1)
        self.final_norm = norm(config=config, hidden_size=size, eps=eps)
        self.embedding: Tensor | None = None

    def forward(
        self, hidden: Tensor, tokens: Tensor, sequences: PackedSequences, rotary: Tensor | None
    ) -> Tensor:
        """What the output layer is to be given.

        Args:
            hidden: The model's output at m tokens, [m, 1, hidden size], on every tensor parallel rank.
            tokens: The token after each, [m] int64.
            sequences: How the m are packed.
            rotary: Angles of their positions.

        Returns:
            [m, 1, hidden size]; with sequence parallelism this rank's share of the m.
        """
        hidden, embedded = (self._own(each) for each in (hidden, self._embedded(tokens)))
        parts = [self.token_norm(embedded), self.hidden_norm(hidden)]
        x, _ = self.projection(torch.cat(parts[::-1] if self._hidden_first else parts, dim=-1))
        x, _ = self.layer(
            hidden_states=x, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=sequences
        )
        normed: Tensor = self.final_norm(x)
        return normed

    @torch.no_grad()
    def _embedded(self, tokens: Tensor) -> Tensor:
        """[m, 1, hidden size], from the ranks that have the tokens' rows."""
        assert self.embedding is not None, "only while the embedding is lent"
        group = parallel_state.get_tensor_model_parallel_group()
        own = tokens - group.rank() * len(self.embedding)
        is_here = (own >= 0) & (own < len(self.embedding))
        rows = F.embedding(own.where(is_here, 0), self.embedding) * is_here.unsqueeze(-1)
        if group.size() > 1:
            dist.all_reduce(rows, group=group)
        return rows.unsqueeze(1)

    def _own(self, of_all: Tensor) -> Tensor:
        """This rank's share of the tokens."""
        if not self.config.sequence_parallel:
            return of_all
        group = parallel_state.get_tensor_model_parallel_group()
        return of_all.chunk(group.size())[group.rank()]


def _of_one_layer(model_config: TransformerConfig) -> TransformerConfig:
    """The configuration of a model of one layer, that has experts if the model has some."""
    config = copy.copy(model_config)
    config.num_layers = config.pipeline_model_parallel_size = 1
    config.virtual_pipeline_model_parallel_size = None
    config.num_layers_in_first_pipeline_stage = config.num_layers_in_last_pipeline_stage = None
    config.moe_layer_freq = 1
    config.moe_aux_loss_coeff = 0.0  # its experts are counted with no other layer's
    config.moe_z_loss_coeff = None
    return config


def add_head(model: GPTModel, shape: ModelShape, scale: float, chunk_size: int) -> None:
    """Give a chunk of a new model the head, if it is the last one; all of them know that there is one."""
    setattr(model, _EXPECTED, True)
    if model.post_process:
        model.add_module(_NAME, MtpHead(shape, model.config, scale, chunk_size))


def expects_head(model: torch.nn.Module) -> bool:
    """Whether the model that this is a chunk of has a head, on whichever rank."""
    return getattr(model, _EXPECTED, False)


def head_of(model: torch.nn.Module) -> MtpHead | None:
    """The head of a chunk of a model."""
    return getattr(model, _NAME, None)


@contextmanager
def without_head(models: Sequence[GPTModel]) -> Iterator[None]:
    """While entered, the model has none: for weights that never compute it, such as a reference's, and may lack it."""
    last, expected = models[-1], [expects_head(each) for each in models]
    head = head_of(last)
    for each in models:
        setattr(each, _EXPECTED, False)
    if head is not None:
        delattr(last, _NAME)
    try:
        yield
    finally:
        if head is not None:
            last.add_module(_NAME, head)
        for each, was in zip(models, expected, strict=True):
            setattr(each, _EXPECTED, was)


@contextmanager
def lent_embedding(models: Sequence[GPTModel]) -> Iterator[None]:
    """While entered, the head has the embedding. All ranks enter together; weights do not change meanwhile.

    It is the first pipeline stage's; where it is tied to the output layer the last one has a copy already.
    """
    first, last = models[0], models[-1]
    if not expects_head(first):
        yield
        return
    head = head_of(last)
    if first.pre_process and last.post_process:
        lent = first.embedding.word_embeddings.weight.detach()
    elif last.share_embeddings_and_output_weights:
        lent = last.output_layer.weight.detach() if head is not None else None
    else:
        lent = _sent_to_last_stage(first, last)
    if head is not None:
        head.embedding = lent
    try:
        yield
    finally:
        if head is not None:
            head.embedding = None


def _sent_to_last_stage(first: GPTModel, last: GPTModel) -> Tensor | None:
    if first.pre_process:
        weight = first.embedding.word_embeddings.weight.detach()
    elif last.post_process:
        weight = torch.empty_like(last.output_layer.weight, requires_grad=False)
    else:
        return None
    group = parallel_state.get_embedding_group()
    source = dist.get_global_rank(group, 0)
    dist.broadcast(weight.view(torch.uint8), src=source, group=group)  # gloo knows few types
    return weight


@contextmanager
def noted_output(model: GPTModel) -> Iterator[list[Tensor]]:
    """While entered, what goes into the output layer is noted, without its gradient, if there is a head."""
    noted: list[Tensor] = []
    if head_of(model) is None:
        yield noted
        return
    hook = model.decoder.register_forward_hook(lambda *call: noted.append(call[-1].detach()))
    try:
        yield noted
    finally:
        hook.remove()


def head_logits(
    model: GPTModel,
    output: Tensor,
    places: Tensor,
    tokens: Tensor,
    sequences: PackedSequences,
    rows: Tensor,
) -> Tensor:
    """This rank's columns of the head's logits, [rows, padded vocabulary / ranks].

    Args:
        model: The last chunk of the model.
        output: What went into its output layer, [own t, 1, hidden size].
        places: Of m tokens among the t of the model, [m] int64.
        tokens: The token after each of the m, [m] int64.
        sequences: How the m are packed.
        rows: Which of the m logits are wanted of, int64.
    """
    head = head_of(model)
    assert head is not None
    is_split = head.config.sequence_parallel
    with torch.no_grad():
        hidden = gather_from_sequence_parallel_region(output) if is_split else output
        hidden = hidden.index_select(0, places)
        rotary = None
        if not head.config.multi_latent_attention:
            rotary = model.rotary_pos_emb(max(sequences.lengths), packed_seq=True)
    x = head(hidden, tokens, sequences, rotary)
    x = gather_from_sequence_parallel_region(x) if is_split else x
    x = x.squeeze(1).index_select(0, rows)
    if not is_split:
        x = copy_to_tensor_model_parallel_region(x)
    return F.linear(x, _output_weight(model).detach())


def _output_weight(model: GPTModel) -> Tensor:
    if model.share_embeddings_and_output_weights:
        shared: Tensor = model.shared_embedding_or_output_weight()
        return shared
    weight: Tensor = model.output_layer.weight
    return weight
