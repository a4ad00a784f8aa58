"""Starts runs from a login node or a laptop."""
