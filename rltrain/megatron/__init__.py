"""The trainer: a Megatron-core GPT model, its weights, its optimizer steps and its checkpoints."""
