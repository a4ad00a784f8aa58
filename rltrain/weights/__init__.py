"""Weights on their way out of the trainer: Hugging Face directories and updates of the engines."""
