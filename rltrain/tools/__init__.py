"""Commands beside a run: converting checkpoints, and looking into one sample."""
