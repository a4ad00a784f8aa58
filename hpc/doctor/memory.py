"""How much memory a run needs on a trainer rank and on an engine: pure functions of the model's shape.

An estimate to tell "fits" from "never will": weights, gradients and optimizer state are exact, activations are
counted tensor by tensor for a decoder layer whose attention keeps no scores, and allocators need a tenth more.
All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rltrain.arguments.groups.training import logits_rows
from rltrain.arguments.hf_config import ModelShape

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one tensor parallel rank: its share, and those that every rank has."""

    split: int
    replicated: int

    @property
    def total(self) -> int:
        """Both."""
        return self.split + self.replicated


@dataclass(frozen=True)
class TrainerAsk:
    """The work of a trainer rank.

    Attributes:
        tensor, data, pipeline: sizes of tensor, data and pipeline parallelism.
        expert: ranks that share the experts, by expert and tensor parallelism.
        tokens: in the largest micro-batch.
        log_probs_chunk_size: of them, whose log-probs are computed at a time; -1 for what a GPU takes.
        keeps_reference: whether reference weights visit the device (KL loss).
        lora_rank: of adapters, which alone are trained; 0: everything is.
    """

    tensor: int
    data: int
    bf16: bool
    distributed_optimizer: bool
    sequence_parallel: bool
    recompute: bool
    tokens: int
    log_probs_chunk_size: int = -1
    keeps_reference: bool = False
    pipeline: int = 1
    expert: int = 1
    lora_rank: int = 0


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one trainer rank."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int

    @property
    def state(self) -> int:
        """Bytes that stay between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def working(self) -> int:
        """Bytes that a forward and backward pass takes."""
        return self.activations + self.logits

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.state + self.working


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one rank of an engine; `kv_per_token` is what a token of context takes on it."""

    weights: int
    kv_per_token: int

    def tokens_in(self, memory: float) -> int:
        """Number of tokens of context that fit beside the weights."""
        return max(0, int((memory - self.weights) // self.kv_per_token))


def count_parameters(shape: ModelShape, tensor: int = 1, pipeline: int = 1, expert: int = 1) -> Parameters:
    """Parameters on one rank; the vocabulary is padded so that it divides.

    Args:
        tensor: Ranks that share all but the experts.
        pipeline: Stages; the one with most layers and an embedding counts.
        expert: Ranks that share the experts, by expert and tensor parallelism.
    """
    vocab = -(-shape.vocab_size // tensor) * tensor
    layers = -(-shape.num_layers // pipeline)
    qkv = ((1 + shape.family.output_gate) * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    attention = shape.hidden_size * qkv + shape.num_heads * shape.head_dim * shape.hidden_size
    attention += qkv if shape.qkv_bias else 0
    whole = 0  # of the attention, on every tensor parallel rank
    if shape.latent is not None:
        attention, whole = shape.latent.weights(shape.hidden_size, shape.num_heads)
    of_heads = 2 * shape.head_dim if shape.qk_norm else 0
    attentions, own_norms = layers * attention, layers * of_heads
    if shape.linear is not None:
        linear = layers * len(shape.linear.layers) // shape.num_layers
        attentions += linear * (shape.linear.weights(shape.hidden_size) - attention)
        own_norms += linear * (shape.linear.value_size - of_heads)
    embeddings = vocab * shape.hidden_size * (1 if shape.tied_embeddings or pipeline > 1 else 2)
    norms = (4 if shape.family.post_norms else 2) * shape.hidden_size
    norms += shape.latent.kv_rank + (shape.latent.query_rank or 0) if shape.latent else 0
    with_experts, experts, shared, routers = 0, 0, 0, 0
    if shape.experts is not None:
        with_experts = min(layers, len(shape.experts.layers))
        routers = with_experts * shape.experts.count * shape.hidden_size
        experts = 3 * routers * shape.experts.ffn_hidden_size // expert
        routers += with_experts * shape.hidden_size * shape.experts.shared_gate
        shared = with_experts * 3 * shape.hidden_size * shape.experts.shared_size
    dense = (layers - with_experts) * 3 * shape.hidden_size * shape.ffn_hidden_size
    return Parameters(
        split=(attentions + dense + shared + embeddings) // tensor + experts,
        replicated=layers * (norms + whole) + own_norms + shape.hidden_size + routers,
    )


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of LoRA's adapters on all linear layers that can have one, of the whole model."""
    queries, values = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + values)
    mlp = 0 if shape.experts else 3 * (shape.hidden_size + shape.ffn_hidden_size)
    return rank * shape.num_layers * (attention + mlp)


def trainer_memory(shape: ModelShape, ask: TrainerAsk) -> TrainerMemory:
    """Memory of a rank with Megatron-core's Adam: gradients in fp32; with bf16 weights also fp32 master weights.

    The distributed optimizer splits Adam's two moments and the master weights over data parallel ranks.
    """
    count = count_parameters(shape, ask.tensor, ask.pipeline, ask.expert).total
    return _memory(shape, ask, count, outputs=-(-shape.vocab_size // ask.tensor))


def critic_memory(shape: ModelShape, ask: TrainerAsk) -> TrainerMemory:
    """The same for PPO's critic, which has a linear layer to one number where the policy has its output layer."""
    count = _critic_parameters(shape, ask.tensor, ask.pipeline, ask.expert)
    return _memory(shape, replace(ask, keeps_reference=False), count, outputs=1)


def both_memory(policy: TrainerMemory, critic: TrainerMemory | None, *, in_turn: bool) -> int:
    """Bytes of a rank that trains both, `in_turn` or with both in its memory all the time."""
    if critic is None:
        return policy.total
    if in_turn:
        return max(policy.total, critic.total)
    return policy.state + critic.state + max(policy.working, critic.working)


def _critic_parameters(shape: ModelShape, *sizes: int) -> int:
    return count_parameters(replace(shape, tied_embeddings=True), *sizes).total + shape.hidden_size + 1


def _memory(shape: ModelShape, ask: TrainerAsk, count: int, outputs: int) -> TrainerMemory:
    width = BF16 if ask.bf16 else FP32
    state = 2 * FP32 + (FP32 if ask.bf16 else 0)
    rows = logits_rows(ask.log_probs_chunk_size, outputs)
    adapters = adapter_parameters(shape, ask.lora_rank) // ask.pipeline  # at most: some of it is split
    trained = adapters if ask.lora_rank else count
    owned = -(-trained // ask.data) if ask.distributed_optimizer else trained
    return TrainerMemory(
        weights=(count + adapters) * width,
        gradients=trained * FP32,
        optimizer=owned * state,
        reference=count * width if ask.keeps_reference else 0,
        activations=_activations(shape, ask) * width,
        # the logits and their gradient, and two fp32 numbers for each that is worked on
        logits=(2 * width * ask.tokens + 2 * FP32 * min(ask.tokens, rows)) * outputs,
    )


def _activations(shape: ModelShape, ask: TrainerAsk) -> int:
    """Numbers that the forward pass keeps for the backward pass.

    A layer keeps, of every token, the inputs and outputs of its two norms (4 h); queries, keys and values; the
    attention's output; gate and up projections and their product (3 ffn). Full recomputation keeps the input only,
    and at one time one layer's. The first of several pipeline stages has fewer layers but keeps as many micro-batches
    more, so their number does not matter.
    """
    experts = shape.experts
    ffn = max(
        shape.ffn_hidden_size, experts.top_k * experts.ffn_hidden_size + experts.shared_size if experts else 0
    )
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    split = (heads + 3 * ffn) // ask.tensor
    hidden = shape.hidden_size // (ask.tensor if ask.sequence_parallel else 1)
    layer = 4 * hidden + split
    kept = layer + shape.num_layers * hidden if ask.recompute else shape.num_layers * layer
    return ask.tokens * kept


def engine_memory(shape: ModelShape, tensor: int, bf16: bool) -> EngineMemory:
    """Memory of one of `tensor` ranks of an engine. Key-value heads are copied where there are fewer than ranks."""
    width = BF16 if bf16 else FP32
    kv_heads = max(1, shape.num_kv_heads // tensor)
    layers = shape.num_layers - (
        len(shape.linear.layers) if shape.linear else 0
    )  # those keep a state a request
    return EngineMemory(
        weights=count_parameters(shape, tensor).total * width,
        kv_per_token=2 * layers * kv_heads * shape.head_dim * width,
    )


def checkpoint_bytes(shape: ModelShape, bf16: bool, *, critic: bool = False, lora_rank: int = 0) -> int:
    """Size of a checkpoint of all ranks: weights, Adam's moments and, with bf16 weights, the fp32 master weights.

    Args:
        critic: With the critic's, which is saved beside it.
        lora_rank: The optimizer has adapters of this rank only; 0: everything.
    """
    count = count_parameters(shape).total + (_critic_parameters(shape) if critic else 0)
    adapters = adapter_parameters(shape, lora_rank)
    trained = adapters if lora_rank else count
    return (count + adapters) * (BF16 if bf16 else FP32) + trained * ((FP32 if bf16 else 0) + 2 * FP32)
