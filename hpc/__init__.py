"""Plan, submit and watch reinforcement-learning jobs. Imports neither torch, megatron nor sglang."""
