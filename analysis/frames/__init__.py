"""The frames of a run: what was read, as tidy pandas tables."""
