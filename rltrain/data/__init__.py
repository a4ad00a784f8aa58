"""Data: prompts in, samples out, and how a rollout is shared out for training."""
