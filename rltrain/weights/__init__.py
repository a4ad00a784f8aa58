"""Weights on their way from the trainer into the engines: cut into buckets, sent, received, confirmed."""

# Import path of the loader that runs in the engines (`--custom-weight-loader`). Running engines know this name.
LOADER = "rltrain.weights.receive.load_weights"
