"""Families of models: what their `config.json` means. Beside them, as recipes, the shapes of published models."""
