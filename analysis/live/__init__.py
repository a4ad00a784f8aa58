"""The live page: all runs of a directory in a browser, read from their run directories only."""
