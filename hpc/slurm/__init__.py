"""Read what Slurm's commands print, and run them.

Pure: `states` (what a state word means), `nodelist`, `values`, `parse` (jobs), `partitions` (partitions, nodes),
`cluster` (everything that a plan needs). Thin: `client` runs the commands, `facts` asks for what is in `cluster`.
"""
