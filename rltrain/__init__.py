"""Reinforcement learning of a Megatron-core model on SGLang rollouts."""
