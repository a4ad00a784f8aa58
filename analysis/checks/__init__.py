"""The checks of `run.doctor()`, and the findings that they give."""
