"""Weights of the trainer as Hugging Face tensors, into buffers on the CPU, against a plain copy of the same bytes.

python benchmarks/hf_export.py [--shape 20M]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from trainer_step import SHAPES, make_actor

WARM_UP, ROUNDS = 3, 15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="20M")
    parser.set_defaults(samples=8, longest=8, bf16=False)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        actor = make_actor(options, Path(directory))
    import torch

    from rltrain.megatron.model.export import export_hf_weights

    weights = {name: tensor.clone() for name, tensor in export_hf_weights(actor.models, actor.shape)}
    targets = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    sizes = sum(tensor.nbytes for tensor in weights.values())
    export, copy = [], []
    for number in range(WARM_UP + ROUNDS):
        start = time.perf_counter()
        for name, tensor in export_hf_weights(actor.models, actor.shape):
            targets[name].copy_(tensor)
        middle = time.perf_counter()
        for name, tensor in weights.items():
            targets[name].copy_(tensor)
        if number >= WARM_UP:
            export.append(middle - start)
            copy.append(time.perf_counter() - middle)
    ours, plain = statistics.median(export), statistics.median(copy)
    print(
        f"export of {len(weights)} tensors, {sizes / 1e6:.0f} MB: copy / export = {plain / ours:.3f};"
        f" {sizes / ours / 1e9:.2f} GB/s against {sizes / plain / 1e9:.2f} GB/s"
    )


if __name__ == "__main__":
    main()
