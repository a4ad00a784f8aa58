"""Places to run programs that are not trusted: start, run, read, write, stop."""
