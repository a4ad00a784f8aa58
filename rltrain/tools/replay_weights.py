"""The weights that wrote a sample, as a Hugging Face directory: found as one, or converted from a checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rltrain.arguments.groups.checkpoint import Checkpoint, starts_elsewhere
from rltrain.arguments.groups.model import Model
from rltrain.megatron.checkpoint.directory import is_complete, iteration_directory
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample


@contextmanager
def hf_directory(weights: Path, origin: Path, *, trust: bool) -> Iterator[Path]:
    """`weights` if it is a Hugging Face directory, or what a checkpoint is converted to, for as long as entered.

    Args:
        weights: A Hugging Face directory, a checkpoint, or a directory of checkpoints, of which the newest is taken.
        origin: Model that config.json and tokenizer are taken from.
        trust: Convert a checkpoint even if other users may have written it.

    Raises:
        UserError: it is neither of them, or not to be trusted.
    """
    if any(weights.glob("*.safetensors")):
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="replay-") as directory:
        output = Path(directory) / "model"
        print(f"converting {weights}")
        _convert(weights, origin, output, trust)
        yield output


def find_weights(layout: RunLayout, checkpoint: Checkpoint, model: Model, sample: Sample) -> Path:
    """The weights that wrote the sample: a Hugging Face directory, or else a checkpoint of the run.

    Raises:
        UserError: there are none; says where they were looked for.
    """
    versions = [int(version) for version in sample.weight_versions if version.isdigit()]
    version = versions[-1] if versions else 0
    places = [layout.weights / f"v{version:06d}"]
    if version and checkpoint.save_hf:
        places.append(Path(checkpoint.save_hf.format(rollout_id=version - 1)))
    if not version and not model.random_init and not starts_elsewhere(checkpoint):
        places.append(Path(model.hf_checkpoint))
    found = next((place for place in places if any(place.glob("*.safetensors"))), None)
    saved = iteration_directory(Path(checkpoint.save or layout.checkpoints), version)
    if found is None and saved.is_dir() and is_complete(saved):
        return saved
    if found is None:
        raise UserError(
            f"the weights of version {version} are not in {' or '.join(map(str, [*places, saved]))}: give a"
            " Hugging Face directory or a checkpoint, --frozen DIR."
        )
    return found


def _convert(checkpoint: Path, origin: Path, output: Path, trust: bool) -> None:
    """In a process of its own, which gives the trainer's memory back."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rltrain.tools.convert_torch_dist_to_hf", "--input-dir", checkpoint),
            *("--output-dir", output, "--origin-hf-dir", origin),
            *(["--trust-load"] if trust else []),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise UserError(
            f"{checkpoint} is not a model, and its conversion failed: {lines[-1].removeprefix('error: ')}"
        )
