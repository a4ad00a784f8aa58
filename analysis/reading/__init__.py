"""Reads the files of a run directory, whether the run is finished or live, and names the files that are damaged."""
