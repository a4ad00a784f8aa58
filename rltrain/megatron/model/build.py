"""A Hugging Face model's shape as a Megatron-core GPT model.

A rank holds a list of chunks of the model: one, or several with virtual pipeline stages.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from rltrain.arguments.config import Config
from rltrain.arguments.groups.functions import Functions
from rltrain.arguments.groups.model import Model
from rltrain.arguments.groups.parallel import Parallel, virtual_stages
from rltrain.arguments.hf_config import (
    ModelShape,
    check_hf_config,
    check_same_shape,
    read_model_shape,
)
from rltrain.arguments.model_flags import check_lora, check_model_flags, check_mtp, check_quantised
from rltrain.megatron.core_config import build_config
from rltrain.megatron.device import device, use_cuda
from rltrain.megatron.model.customize import custom_model
from rltrain.megatron.model.layers.activations import gelu_tanh, quick_gelu
from rltrain.megatron.model.layers.latent import complete_latent_attention
from rltrain.megatron.model.layers.lora import add_adapters
from rltrain.megatron.model.layers.mtp import add_head, head_of
from rltrain.megatron.model.layers.rotary import inverse_frequencies, set_frequencies
from rltrain.megatron.model.layers.soft_cap import soft_capped_
from rltrain.megatron.model.specs import decoder_spec, use_transformer_engine
from rltrain.megatron.ranks import together
from rltrain.megatron.versions import normalises_plain_queries
from rltrain.models.as_transformers import kept_standard_config, standard_config
from rltrain.models.directory import read_hf_config
from rltrain.models.latent import LatentAttention
from rltrain.run.errors import UserError


def read_shape(config: Config, kept: Path | None = None) -> ModelShape:
    """The model's shape, from the `config.json` of `--hf-checkpoint`, with its head for one token more if that is
    trained. All ranks call it together.

    Args:
        kept: File of a run for what transformers makes of that `config.json`, see `kept_standard_config`.

    Raises:
        UserError: there is no `config.json`, it describes a model that cannot be trained, or it means another one to
            transformers.
    """
    directory = config.model.hf_checkpoint
    hf_config = read_hf_config(Path(directory), without_weights=True)
    check_hf_config(hf_config, config.parallel, directory)
    check_model_flags(config.shape, hf_config, directory)
    check_quantised(hf_config, config)
    check_lora(hf_config, config.lora)
    check_mtp(hf_config, config.mtp, directory)
    together(lambda: _compare(hf_config, directory, kept) if dist.get_rank() == 0 else None, UserError)
    shape = read_model_shape(hf_config)
    return replace(shape, head=shape.family.head) if config.mtp.enable_mtp_training else shape


def _compare(hf_config: dict[str, Any], directory: str, kept: Path | None) -> None:
    if kept is None:
        standard = standard_config(Path(directory), hf_config)
    else:
        standard = kept_standard_config(Path(directory), hf_config, kept)
    if standard is not None:
        check_same_shape(hf_config, standard, directory)


def params_dtype(model: Model) -> torch.dtype:
    """The weights' type; gradients and the optimizer are in fp32 either way."""
    return torch.bfloat16 if model.bf16 else torch.float32


def padded_vocab_size(shape: ModelShape, parallel: Parallel, model: Model) -> int:
    """The vocabulary with as many unused rows as it takes to divide it over tensor parallel ranks."""
    size = parallel.tensor_model_parallel_size * model.make_vocab_size_divisible_by
    return -(-shape.vocab_size // size) * size


def transformer_config(shape: ModelShape, config: Config) -> TransformerConfig:
    """Megatron-core's configuration."""
    return build_config(
        MLATransformerConfig if shape.latent else TransformerConfig,
        config.model,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=shape.family.biases,
        normalization="RMSNorm",
        gated_linear_unit=True,
        **_activation(shape),
        layernorm_zero_centered_gamma=shape.family.zero_centered_norms,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_std,
        # Not switched off where weights are loaded afterwards: only initialising marks a weight as split over
        # tensor parallel ranks, without which the gradient's norm misses the other ranks' parts.
        perform_initialization=True,
        # The same random weights for every number of ranks; and on the CPU there is no other way.
        use_cpu_initialization=config.model.random_init or not use_cuda(),
        bf16=bool(config.model.bf16),
        params_dtype=params_dtype(config.model),
        moe_token_dispatcher_type=config.model.moe_token_dispatcher_type,
        recompute_granularity=config.model.recompute_granularity,
        recompute_method=config.model.recompute_method,
        recompute_num_layers=config.model.recompute_num_layers,
        **_attention_config(shape),
        **_window_config(shape, config.parallel, config.model),
        **_parallel_config(shape, config.parallel, config.model),
        **_fusions(shape, config.functions),
        **_experts_config(shape, config.parallel, config.model),
    )


def _attention_config(shape: ModelShape) -> dict[str, Any]:
    layers = range(shape.num_layers)
    return {
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "add_qkv_bias": shape.qkv_bias,
        "attention_output_gate": shape.family.output_gate,
        # Our own layer. Megatron-core reads it where it saves layers that are not alike.
        "linear_attention_freq": [int(i in shape.linear.layers) for i in layers] if shape.linear else None,
        "rotary_interleaved": shape.family.rotary_interleaved,
        # Of queries and keys, so that it counts twice.
        "softmax_scale": (shape.rope.attention_factor**2 if shape.rope.percent == 1 else 1)
        * (shape.multipliers.attention or 1 / math.sqrt(shape.head_dim)),
        "no_rope_freq": [int(i in shape.unrotated) for i in layers] if shape.unrotated else None,
        "softmax_type": "learnable" if shape.family.sinks else "vanilla",
        **(_latent_config(shape) if shape.latent else {"qk_layernorm": shape.qk_norm}),
    }


def _parallel_config(shape: ModelShape, parallel: Parallel, model: Model) -> dict[str, Any]:
    stages = virtual_stages(parallel, shape.num_layers)
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": stages,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "pipeline_dtype": params_dtype(model),
        # Micro-batches of different length tell the next stage their shape, which Megatron-core cannot do where
        # both neighbours are one rank, so with virtual stages all are padded to one length.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1
        and not uniform_micro_batches(parallel, model),
        # Two stages with virtual ones exchange two messages at a time, which only this keeps apart.
        "overlap_p2p_comm": stages is not None,
        "batch_p2p_comm": stages is None,
    }


def _fusions(shape: ModelShape, functions: Functions) -> dict[str, Any]:
    """Fused kernels: TransformerEngine has them; without it they cost a torch.compile in the first step."""
    family, fused = shape.family, use_transformer_engine()
    # Not for a user's model, which may tie its weights, or have another activation.
    fuses_on_cpu = not use_cuda() and functions.custom_model_provider_path is None
    return {
        # On a CPU `rltrain.megatron.cpu` has one, though not of experts.
        "bias_activation_fusion": (fused or (fuses_on_cpu and not shape.experts))
        and not family.gelu
        and not family.biases,
        "bias_dropout_fusion": fused and not family.biases,
        # TransformerEngine's kernel for packed sequences rotates halves only.
        "apply_rope_fusion": fused and not (family.rotary_interleaved or shape.latent),
        "masked_softmax_fusion": False,
        "persist_layer_norm": fused,
        "gradient_accumulation_fusion": fuses_on_cpu,  # on a GPU the output layer needs Apex, see docs/gpu.md
    }


def _window_config(shape: ModelShape, parallel: Parallel, model: Model) -> dict[str, Any]:
    window = shape.window
    if window is None:
        return {}
    own_attention = not use_transformer_engine() or shape.family.sinks or shape.soft_caps.scores is not None
    if not own_attention and parallel.context_parallel_size > 1:
        raise UserError(
            f"--context-parallel-size {parallel.context_parallel_size}: {model.hf_checkpoint} has"
            f" attention with a sliding window of {window.size} tokens, which TransformerEngine's context parallelism"
            " does not support. Use --context-parallel-size 1, with more --tensor-model-parallel-size."
        )
    return {
        "window_size": (window.size - 1, 0),  # tokens before and after a token's own
        "window_attn_skip_freq": [int(i in window.layers) for i in range(shape.num_layers)],
    }


def _latent_config(shape: ModelShape) -> dict[str, Any]:
    latent, rope = shape.latent, shape.rope
    assert latent is not None
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_size,
        "qk_pos_emb_head_dim": latent.rotated_size,
        "v_head_dim": latent.value_size,
        **_latent_norms(latent),
        "rope_type": "yarn",  # all kinds: `complete_latent_attention` brings the angles
        # These two make the scale of queries with keys.
        "rotary_scaling_factor": rope.factor,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _latent_norms(latent: LatentAttention) -> dict[str, Any]:
    """The norms of compressed queries, keys and values, which are parts of the projections behind them.

    Raises:
        UserError: Megatron-core would normalise what it must not.
    """
    if not use_transformer_engine():
        return {"transformer_impl": "local", "qk_layernorm": False}  # our own projections have them
    if latent.query_rank is None and normalises_plain_queries():
        raise UserError(
            "the model's config.json sets q_lora_rank to null: with TransformerEngine, this megatron-core normalises"
            " the input of such queries. Install one before 0.19, such as 0.18.2 (on Python 3.11: 0.16.1), or remove"
            " TransformerEngine."
        )
    return {"qk_layernorm": True}


def _activation(shape: ModelShape) -> dict[str, Any]:
    """What the gate goes through, and what then happens to the product with the other half."""
    if shape.experts is None or shape.experts.limit is None:
        return {"activation_func": gelu_tanh if shape.family.gelu else F.silu}
    return {
        "activation_func": quick_gelu,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": shape.experts.limit,
    }


def uniform_micro_batches(parallel: Parallel, model: Model) -> bool:
    """Whether all micro-batches of a step must have the same number of tokens, on all ranks."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank or parallel.num_layers_per_virtual_pipeline_stage
    return bool(virtual or model.moe_token_dispatcher_type == "allgather")


def _experts_config(shape: ModelShape, parallel: Parallel, model: Model) -> dict[str, Any]:
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(i in experts.layers) for i in range(shape.num_layers)],
        "moe_router_topk": experts.top_k,
        # The softmax over the chosen experts alone is the softmax over all, normalised afterwards.
        "moe_router_pre_softmax": experts.score == "softmax" and not experts.normalized,
        "moe_router_score_function": experts.score,
        "moe_router_enable_expert_bias": experts.correction_bias,
        # As loaded: Megatron-core would move it in every step. --moe-router-bias-update-rate asks for that.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": experts.groups if experts.groups > 1 else None,
        "moe_router_group_topk": experts.groups_taken if experts.groups > 1 else None,
        "moe_router_topk_scaling_factor": experts.scale if experts.scale != 1 else None,
        "moe_shared_expert_intermediate_size": experts.shared_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def build_model(shape: ModelShape, run_config: Config) -> list[GPTModel]:
    """This rank's chunks of the model, on its device, with the random weights that `args.seed` gives."""
    config = transformer_config(shape, run_config)
    stages = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(stages)
    each_stage = range(stages) if stages else [None]
    models = [_build_chunk(shape, run_config, config, stage) for stage in each_stage]
    _mark_experts(models, config)
    if shape.family.whole_qk_norm:
        # From here on it only says that gradients of such norms are added over tensor parallel ranks, but one over all
        # heads is split.
        config.qk_layernorm = False
    if run_config.lora.lora_rank:
        add_adapters(models, shape, run_config.lora, run_config.optimizer.seed)
    return models


def _build_chunk(
    shape: ModelShape, run_config: Config, config: TransformerConfig, stage: int | None
) -> GPTModel:
    where: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
    first, last = (
        parallel_state.is_pipeline_first_stage(**where),
        parallel_state.is_pipeline_last_stage(**where),
    )
    if run_config.functions.custom_model_provider_path:
        own = custom_model(run_config, config, pre_process=first, post_process=last, vp_stage=stage)
        return own.to(device())
    model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(
            config,
            stage,
            family=shape.family,
            linear=shape.linear,
            residual=shape.multipliers.residual,
            soft_cap=shape.soft_caps.scores,
        ),
        vocab_size=padded_vocab_size(shape, run_config.parallel, run_config.model),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        rotary_percent=shape.rope.percent,
        vp_stage=stage,
    )
    if shape.head is not None:
        add_head(model, shape, run_config.mtp.scale, run_config.training.log_probs_chunk_size)
    if shape.latent:
        size, head = shape.latent.rotated_size, head_of(model)
        layers = [*model.decoder.layers, *([] if head is None else [head.layer])]
        complete_latent_attention(layers, shape.rope, inverse_frequencies(shape.rope, size), size)
    else:
        set_frequencies(model, shape)
    embedding = _embedding_factor(shape, config.params_dtype)
    if first and embedding != 1:
        model.embedding.register_forward_hook(lambda *call: call[-1] * embedding)
    if last and shape.multipliers.logits != 1:
        model.output_layer.register_forward_hook(
            lambda *call: (call[-1][0] * shape.multipliers.logits, *call[-1][1:])
        )
    if last and (cap := shape.soft_caps.logits) is not None:
        model.output_layer.register_forward_hook(
            lambda *call: (soft_capped_(call[-1][0], cap), *call[-1][1:])
        )
    return model.to(device())


def _mark_experts(models: list[GPTModel], config: TransformerConfig) -> None:
    """Tell Megatron-core whether experts' gradients are summed over other ranks than all other weights'.

    Its own layers say so only where experts are shared out, not where tensor parallel ranks hold them whole. And each
    rank's biases count in the gradient's norm: TransformerEngine's layers call them copies of the first rank's, which
    Megatron-core before 0.19 then leaves out.
    """
    alike = config.expert_model_parallel_size == 1
    alike &= config.expert_tensor_parallel_size == config.tensor_model_parallel_size
    for model in models:
        for name, weight in model.named_parameters():
            if ".mlp.experts." in name:
                weight.allreduce = alike
                if ".bias" in name:  # such experts are never split
                    weight.tensor_model_parallel = True


def _embedding_factor(shape: ModelShape, dtype: torch.dtype) -> float:
    if shape.family.root_embedding:
        return torch.tensor(math.sqrt(shape.hidden_size)).to(dtype).item()
    return shape.multipliers.embedding


def wrap_data_parallel(
    chunks: list[GPTModel], parallel: Parallel, model: Model
) -> list[DistributedDataParallel]:
    """The chunks with Megatron-core's gradient buffers and reduction over data parallel ranks."""
    config = build_config(
        DistributedDataParallelConfig,
        model,
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=bool(parallel.use_distributed_optimizer),
        check_for_nan_in_grad=False,  # `TrainedModel.update` checks, and skips the step on all ranks
    )
    wrapped = [DistributedDataParallel(each.config, config, each) for each in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    return wrapped
