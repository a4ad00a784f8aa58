"""One rollout as the trainer trains on it: shares, micro-batches, loss, steps."""
