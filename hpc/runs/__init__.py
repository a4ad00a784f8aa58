"""The state of runs, from their files and from Slurm; nothing here starts or stops one."""
