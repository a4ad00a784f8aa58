"""Recorded runs to try the analysis on."""
