"""From graded samples to what is trained on, and what is reported of it."""
