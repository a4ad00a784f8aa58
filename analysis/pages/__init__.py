"""HTML pages to read samples in; each is one file that needs nothing else."""
