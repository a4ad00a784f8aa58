"""How much arithmetic a sequence costs, so that ranks can be given equal shares of it."""

from __future__ import annotations

from rltrain.arguments.hf_config import ModelShape


def sequence_flops(shape: ModelShape, tokens: int, logits: int) -> float:
    """Floating point operations of one forward pass over a sequence; a backward pass costs twice as much.

    A multiplication and an addition count as two. Norms, rotary embeddings and softmax are left out.

    Args:
        tokens: That go through the layers.
        logits: Positions at which logits are computed.
    """
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    attention_weights = hidden * (
        (2 + shape.family.output_gate) * heads + 2 * shape.num_kv_heads * shape.head_dim
    )
    if shape.latent:
        attention_weights = sum(shape.latent.weights(hidden, shape.num_heads))
        heads = shape.num_heads * (shape.head_dim + shape.latent.value_size) // 2
    experts = shape.experts
    expert_layers = len(experts.layers) if experts else 0
    mlp = (shape.num_layers - expert_layers) * shape.ffn_hidden_size
    router = 0
    if experts:
        mlp += expert_layers * (experts.top_k * experts.ffn_hidden_size + experts.shared_size)
        router = expert_layers * experts.count
    full = shape.num_layers - (len(shape.linear.layers) if shape.linear else 0)
    weights = full * attention_weights + hidden * (3 * mlp + router)
    if shape.linear:
        weights += len(shape.linear.layers) * (shape.linear.weights(hidden) + shape.linear.products())
    # Causal attention: scores and weighted values over half of tokens × tokens, or over a window.
    attention: float = full * heads * tokens
    if shape.window and shape.window.size < tokens:
        size = shape.window.size
        attention -= len(shape.window.layers) * heads * (tokens - size) ** 2 / tokens
    return 2.0 * tokens * (weights + attention) + 2.0 * logits * hidden * shape.vocab_size
