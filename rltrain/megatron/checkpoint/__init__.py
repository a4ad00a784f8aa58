"""Checkpoints: what is in one, saved, loaded, resumed."""
