"""The trainer: a Megatron-core GPT model, its weights, its optimizer steps and its checkpoints."""

from rltrain.packages import prepare_for_megatron

prepare_for_megatron()
