"""Weights on their way out of the trainer: Hugging Face directories and updates of the engines."""

# Import path of what runs in the engines, for their `--custom-weight-loader`.
LOADER = "rltrain.weights.receive.load_weights"
