"""The HTTP server that agents speak to."""
