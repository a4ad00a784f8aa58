"""A Hugging Face model as a `torch_dist` checkpoint, for --load and --ref-load.

    python -m rltrain.tools.convert_hf_to_torch_dist [MODEL FLAGS] --hf-checkpoint DIR --save DIR

Takes the flags of slime's tool of that name: those of the model and of parallelism, and these two. One process on the
CPU will do; under torchrun or srun several convert together. Runs also start from a Hugging Face directory itself.
`--mtp-num-layers 1` converts the layer for one token more, too: --enable-mtp-training needs it in a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rltrain.run.errors import UserError, run_main
from rltrain.run.files import replace_text
from rltrain.tools.conversion import model_args, start


def main(argv: list[str]) -> Path:
    """Convert; returns the checkpoint's directory.

    Raises:
        UserError: bad flags, or not a model that can be converted.
    """
    words = _joined(argv)
    source = next((word.partition("=")[2] for word in words if word.startswith("--hf-checkpoint=")), None)
    if source is None:
        raise UserError("--hf-checkpoint: give the Hugging Face directory.")
    if any(word.startswith("--mtp-num-layers=") for word in words):
        words.append("--enable-mtp-training")  # slime's tool goes by the other flag alone
    config = model_args(words, Path(source).expanduser().absolute())
    if config.checkpoint.save is None:
        raise UserError("--save: give the directory for the checkpoint.")
    start(config.parallel, config.optimizer.seed)
    import torch.distributed as dist

    from rltrain.megatron.checkpoint.directory import RELEASE
    from rltrain.megatron.checkpoint.save import SaveOptions, save_checkpoint
    from rltrain.megatron.checkpoint.state import TrainState
    from rltrain.megatron.model.build import build_model, read_shape
    from rltrain.megatron.model.load import load_hf_weights

    shape = read_shape(config)
    models = build_model(shape, config)
    load_hf_weights(models, shape, Path(config.model.hf_checkpoint))
    saved = save_checkpoint(Path(config.checkpoint.save), 0, TrainState(models), SaveOptions(save_rng=False))
    # As slime's tool leaves it: Megatron's name for weights that begin a run.
    final = saved.with_name(RELEASE)
    if dist.get_rank() == 0:
        saved.rename(final)
        replace_text(final.parent / "latest_checkpointed_iteration.txt", RELEASE, durable=True)
    dist.barrier()
    return final


def _joined(argv: list[str]) -> list[str]:
    """`--flag=value` for every flag with one value, so that one can be looked for."""
    from rltrain.arguments import flags

    return flags.to_argv(flags.split(argv)[1])


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__, end="")
        sys.exit(0)
    sys.exit(run_main(lambda: print(main(sys.argv[1:]))))
