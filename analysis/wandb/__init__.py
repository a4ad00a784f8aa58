"""Runs as W&B recorded them: its offline files, read without W&B, and runs on its server."""
