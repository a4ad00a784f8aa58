"""The mathematics of the algorithms: pure functions, each with its paper, free of processes and models."""
