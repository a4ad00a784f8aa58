"""A checkpoint of a run, of slime or of Megatron-LM as a Hugging Face directory.

    python -m rltrain.tools.convert_torch_dist_to_hf --input-dir DIR --output-dir DIR --origin-hf-dir DIR

One process on the CPU will do, whatever layout the checkpoint was saved with.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from rltrain.megatron.checkpoint.directory import find_checkpoint, is_checkpoint
from rltrain.run.errors import UserError, run_main
from rltrain.tools.conversion import model_args, start


def main(argv: list[str]) -> Path:
    """Convert; returns the directory.

    Raises:
        UserError: there is no usable checkpoint, it is of another model, others may have written it, or the output
            directory is in the way.
    """
    given = _parser().parse_args(argv)
    output, origin = given.output_dir.absolute(), given.origin_hf_dir.absolute()
    if output.exists() and not given.force:
        raise UserError(f"--output-dir {output} exists already: give --force to replace it.")
    config = model_args([], origin)
    if is_checkpoint(given.input_dir.absolute()):  # what it lacks is said before seconds go by in imports
        find_checkpoint(given.input_dir.absolute())
    start(config.parallel, config.optimizer.seed)
    from megatron.core import dist_checkpointing

    from rltrain.megatron.checkpoint.legacy import is_legacy
    from rltrain.megatron.checkpoint.load import load_checkpoint
    from rltrain.megatron.checkpoint.resume import check_directories, usable_checkpoint
    from rltrain.megatron.checkpoint.state import TrainState
    from rltrain.megatron.exporter import head_names, kept_heads
    from rltrain.megatron.model.build import build_model, read_shape
    from rltrain.megatron.model.export import export_hf_weights
    from rltrain.megatron.model.names import HEAD
    from rltrain.weights.transports.hf_directory import write_hf_directory

    check_directories([given.input_dir.absolute()], trust=given.trust_load)
    checkpoint = usable_checkpoint(given.input_dir.absolute())
    if checkpoint is None:
        raise UserError(f"--input-dir {given.input_dir}: it holds no complete checkpoint.")
    shape = read_shape(config)
    if given.vocab_size not in (None, shape.vocab_size):
        raise UserError(
            f"--vocab-size {given.vocab_size}: {origin}/config.json has a vocabulary of {shape.vocab_size}."
        )
    if not is_legacy(checkpoint):
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        dtype = stored["decoder.final_layernorm.weight"].dtype
        adapters = (dist_checkpointing.load_content_metadata(str(checkpoint)) or {}).get("lora") or {}
        has_head = any(name.startswith(HEAD) for name in stored)
        config = config.replace(bf16=str(dtype) == "torch.bfloat16", enable_mtp_training=has_head, **adapters)
        shape = read_shape(config)
    models = build_model(shape, config)
    load_checkpoint(checkpoint, TrainState(models))
    kept = kept_heads(origin, shape, head_names(models, shape))
    tensors = chain(export_hf_weights(models, shape), kept)
    write_hf_directory(output, tensors, origin, given.chunk_size)
    return output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rltrain.tools.convert_torch_dist_to_hf",
        description="Write a checkpoint as a Hugging Face directory. Exit codes: 0, 2 bad input.",
    )
    add = parser.add_argument
    add(
        "--input-dir",
        type=Path,
        required=True,
        help="a checkpoint, or a directory whose newest checkpoint is used",
    )
    add("--output-dir", type=Path, required=True, help="output directory; it appears when it is complete")
    add(
        "--origin-hf-dir",
        type=Path,
        required=True,
        help="model whose config.json and tokenizer are copied",
    )
    add("-f", "--force", action="store_true", help="replace --output-dir")
    add(
        "--chunk-size", type=int, default=2 * 1024**3, metavar="BYTES", help="bytes per file (default: 2 GiB)"
    )
    add(
        "--trust-load",
        action="store_true",
        help="convert a checkpoint that other users may have written: that runs the code in it",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="must equal the one in config.json, which is used in any case",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(lambda: print(main(sys.argv[1:]))))
