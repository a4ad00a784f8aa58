"""Storms of faults over runs on a real Slurm of this machine, and what must be true after them."""
