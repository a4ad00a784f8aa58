"""The trainer: a Megatron-core GPT model, its weights, its optimizer steps and its checkpoints."""

from rltrain.packages import hide_kernels_that_need_a_driver

hide_kernels_that_need_a_driver()
