"""A Hugging Face model's shape as a Megatron-core GPT model.

A rank holds a list of chunks of the model: one, or several with virtual pipeline stages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from rltrain.arguments.errors import UserError
from rltrain.arguments.hf_config import ModelShape, check_hf_config, read_model_shape
from rltrain.arguments.model_flags import check_model_flags
from rltrain.arguments.parallel import virtual_stages
from rltrain.megatron.config import build_config
from rltrain.megatron.custom_model import custom_model
from rltrain.megatron.device import device, use_cuda
from rltrain.megatron.specs import decoder_spec, use_transformer_engine


def read_shape(args: argparse.Namespace) -> ModelShape:
    """The model's shape from `args.hf_checkpoint`.

    Raises:
        UserError: there is no `config.json`, or it describes a model that cannot be trained.
    """
    path = Path(args.hf_checkpoint) / "config.json"
    if not path.exists():
        raise UserError(
            f"--hf-checkpoint {args.hf_checkpoint}: not a model directory, it has no config.json."
        )
    config = json.loads(path.read_text())
    check_hf_config(config, args)
    check_model_flags(args, config)
    return read_model_shape(config)


def params_dtype(args: argparse.Namespace) -> torch.dtype:
    """The weights' type; gradients and the optimizer are in fp32 either way."""
    return torch.bfloat16 if args.bf16 else torch.float32


def padded_vocab_size(shape: ModelShape, args: argparse.Namespace) -> int:
    """The vocabulary with as many unused rows as it takes to divide it over tensor parallel ranks."""
    size = args.tensor_model_parallel_size * args.make_vocab_size_divisible_by
    return -(-shape.vocab_size // size) * size


def transformer_config(shape: ModelShape, args: argparse.Namespace) -> TransformerConfig:
    """Megatron-core's configuration."""
    fused = use_transformer_engine()
    stages = virtual_stages(args, shape.num_layers)
    return build_config(
        TransformerConfig,
        args,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.family.qk_norm,
        add_qkv_bias=shape.family.qkv_bias,
        rotary_interleaved=shape.family.rotary_interleaved,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_std,
        # Not switched off where weights are loaded afterwards: only initialising marks a weight as split over
        # tensor parallel ranks, without which the gradient's norm misses the other ranks' parts.
        perform_initialization=True,
        # The same random weights for every number of ranks; and on the CPU there is no other way.
        use_cpu_initialization=args.random_init or not use_cuda(),
        bf16=args.bf16,
        params_dtype=params_dtype(args),
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        context_parallel_size=args.context_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=stages,
        num_layers_in_first_pipeline_stage=args.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=args.decoder_last_pipeline_num_layers,
        pipeline_dtype=params_dtype(args),
        # Micro-batches of different length tell the next stage their shape, which Megatron-core cannot do where
        # both neighbours are one rank, so with virtual stages all are padded to one length.
        variable_seq_lengths=args.pipeline_model_parallel_size > 1 and not uniform_micro_batches(args),
        moe_token_dispatcher_type=args.moe_token_dispatcher_type,
        # Two stages with virtual ones exchange two messages at a time, which only this keeps apart.
        overlap_p2p_comm=stages is not None,
        batch_p2p_comm=stages is None,
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        # Fused kernels: TransformerEngine has them; without it they cost a torch.compile in the first step.
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        # TransformerEngine's kernel for packed sequences rotates halves only.
        apply_rope_fusion=fused and not shape.family.rotary_interleaved,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        gradient_accumulation_fusion=False,  # needs Apex
        **_experts_config(shape, args),
    )


def uniform_micro_batches(args: argparse.Namespace) -> bool:
    """Whether all micro-batches of a step must have the same number of tokens, on all ranks."""
    virtual = args.num_virtual_stages_per_pipeline_rank or args.num_layers_per_virtual_pipeline_stage
    return bool(virtual or args.moe_token_dispatcher_type == "allgather")


def _experts_config(shape: ModelShape, args: argparse.Namespace) -> dict[str, Any]:
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": [int(i in experts.layers) for i in range(shape.num_layers)],
        "moe_router_topk": experts.top_k,
        # The softmax over the chosen experts alone is the softmax over all, normalised afterwards.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": args.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": args.moe_aux_loss_coeff,
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": args.expert_model_parallel_size,
        "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
    }


def build_model(shape: ModelShape, args: argparse.Namespace) -> list[GPTModel]:
    """This rank's chunks of the model, on its device, with the random weights that `args.seed` gives."""
    config = transformer_config(shape, args)
    stages = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(stages)
    return [_build_chunk(shape, args, config, stage) for stage in (range(stages) if stages else [None])]


def _build_chunk(
    shape: ModelShape, args: argparse.Namespace, config: TransformerConfig, stage: int | None
) -> GPTModel:
    where: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
    first, last = (
        parallel_state.is_pipeline_first_stage(**where),
        parallel_state.is_pipeline_last_stage(**where),
    )
    if args.custom_model_provider_path:
        own = custom_model(args, config, pre_process=first, post_process=last, vp_stage=stage)
        return own.to(device())
    model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(config, stage, post_norms=shape.family.post_norms),
        vocab_size=padded_vocab_size(shape, args),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        rotary_percent=shape.rotary_percent,
        rope_scaling=shape.rope_factor is not None,
        rope_scaling_factor=shape.rope_factor or 1.0,
        vp_stage=stage,
    )
    return model.to(device())


def wrap_data_parallel(models: list[GPTModel], args: argparse.Namespace) -> list[DistributedDataParallel]:
    """The chunks with Megatron-core's gradient buffers and reduction over data parallel ranks."""
    config = build_config(
        DistributedDataParallelConfig,
        args,
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # `TrainedModel.update` checks, and skips the step on all ranks
    )
    wrapped = [DistributedDataParallel(model.config, config, model) for model in models]
    models[0].config.finalize_model_grads_func = finalize_model_grads
    return wrapped
