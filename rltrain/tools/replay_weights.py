"""The weights that wrote a sample, as a Hugging Face directory: as they lie there, or converted from a checkpoint."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc.layout import RunLayout
from rltrain.arguments.errors import UserError
from rltrain.megatron.checkpoint_dir import is_complete, iteration_directory
from rltrain.sample import Sample


@contextmanager
def hf_directory(weights: Path, origin: Path) -> Iterator[Path]:
    """`weights` if it is a Hugging Face directory, or what a checkpoint is converted to, for as long as entered.

    Args:
        weights: A Hugging Face directory, a checkpoint, or a directory of checkpoints, of which the newest is taken.
        origin: Model that config.json and tokenizer are taken from.

    Raises:
        UserError: it is neither.
    """
    if any(weights.glob("*.safetensors")):
        yield weights
        return
    with tempfile.TemporaryDirectory(prefix="replay-") as directory:
        output = Path(directory) / "model"
        print(f"converting {weights}")
        _convert(weights, origin, output)
        yield output


def find_weights(layout: RunLayout, args: argparse.Namespace, sample: Sample) -> Path:
    """The weights that wrote the sample: a Hugging Face directory, or else a checkpoint of the run.

    Raises:
        UserError: there are none; says where they were looked for.
    """
    versions = [int(version) for version in sample.weight_versions if version.isdigit()]
    version = versions[-1] if versions else 0
    places = [layout.weights / f"v{version:06d}"]
    if version and args.save_hf:
        places.append(Path(args.save_hf.format(rollout_id=version - 1)))
    if not version and not args.random_init and not args.load:
        places.append(Path(args.hf_checkpoint))
    found = next((place for place in places if any(place.glob("*.safetensors"))), None)
    checkpoint = iteration_directory(Path(args.save or layout.checkpoints), version)
    if found is None and checkpoint.is_dir() and is_complete(checkpoint):
        return checkpoint
    if found is None:
        raise UserError(
            f"the weights of version {version} are not in {' or '.join(map(str, [*places, checkpoint]))}: give a"
            " Hugging Face directory or a checkpoint, --frozen DIR."
        )
    return found


def _convert(checkpoint: Path, origin: Path, output: Path) -> None:
    """In a process of its own, which gives the trainer's memory back."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rltrain.tools.convert_torch_dist_to_hf", "--input-dir", checkpoint),
            *("--output-dir", output, "--origin-hf-dir", origin),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(
            f"{checkpoint} is no model, and converting it failed: {lines[-1].removeprefix('error: ')}"
        )
