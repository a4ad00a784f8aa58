"""Find out before submitting what would go wrong: packages, disk, network, Slurm, flags, input files, memory.

Takes the flags and recipes of `submit` and starts nothing but, with `--probe-nodes`, a job of a few seconds that
looks at the nodes. One line a check: ok, warn or FAIL, and what to do.
"""
