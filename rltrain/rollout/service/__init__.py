"""The rollout process: what the trainer asks, and who answers."""
