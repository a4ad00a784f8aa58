"""The layer that predicts one token more than the model (MTP): how checkpoints name its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rltrain.models.directory import tensor_files
from rltrain.run.errors import UserError


@dataclass(frozen=True)
class Head:
    """Names of tensors, in which {} stands for the number of layers of the model.

    Attributes:
        layer: Before the names of its transformer layer.
        token_norm: Of the embedding of the next token.
        hidden_norm: Of the model's output.
        projection: Of both together, side by side, to the input of the layer.
        final_norm: Before the output layer, which is the model's.
        hidden_first: The projection takes the model's output before the embedding, not after it.
    """

    layer: str
    token_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    hidden_first: bool = False


def check_weights(head: Head, num_layers: int, directory: Path) -> None:
    """See that a model directory has the layer.

    Raises:
        UserError: names the tensor that is missing.
    """
    try:
        names = tensor_files(directory)
    except (OSError, UserError):
        return  # the trainer says what is wrong with the files
    projection = head.projection.format(num_layers)
    if projection not in names:
        raise UserError(
            f"--enable-mtp-training: {directory} has no tensor {projection}: its weights lack the MTP layer. Give the"
            " released ones, or leave the flag out."
        )


# DeepSeek-V3 (arXiv 2412.19437, section 2.2), and those that have it from there.
BEHIND = Head(
    "model.layers.{}.",
    token_norm="model.layers.{}.enorm.weight",
    hidden_norm="model.layers.{}.hnorm.weight",
    projection="model.layers.{}.eh_proj.weight",
    final_norm="model.layers.{}.shared_head.norm.weight",
)
