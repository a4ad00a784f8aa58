"""The ways that weights take to the engines."""
