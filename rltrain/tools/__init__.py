"""Commands for people who look into one sample of a run."""
