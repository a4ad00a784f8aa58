"""Jinja templates of the batch scripts, as package data."""
