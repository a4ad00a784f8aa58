"""The trainer: a Megatron-core GPT model, its weights, its optimizer steps and its checkpoints."""

from rltrain.packages import compile_nothing_without_a_driver, hide_kernels_that_need_a_driver

hide_kernels_that_need_a_driver()
compile_nothing_without_a_driver()
