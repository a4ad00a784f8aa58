"""Read what Slurm's commands print, and run them."""
