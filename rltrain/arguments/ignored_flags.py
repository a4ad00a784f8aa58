"""Flags of Megatron's and slime's launch scripts that have nothing to do here: accepted, and said to be ignored."""

from __future__ import annotations

import argparse
from typing import Any

# Flag → why; a name that begins with `=` takes no value.
_WHY = {
    "seq-length": "sequences are packed, each as long as it is",
    "max-position-embeddings": "rotary embeddings have no table; the limit is config.json's",
    "tokenizer-type": "the tokenizer is that of --hf-checkpoint",
    "tokenizer-model": "the tokenizer is that of --hf-checkpoint",
    "train-iters": "the length of a run is --num-rollout or --num-epoch",
    "eval-iters": "evaluation sets are evaluated whole",
    "log-interval": "every step is logged",
    "num-workers": "prompts are read by the rollout process",
    "loss-mask-type": "which turns are trained on is seen from the tokenizer's own chat template",
    "train-backend": "there is one backend, Megatron",
    "rotary-scaling-factor": "only multi-latent attention has it; Llama 3's factor is config.json's",
    "spec": "layers are those of config.json's architecture; --custom-model-provider-path builds others",
    "transformer-impl": "TransformerEngine is used where it and a GPU are",
    "update-weight-delta-encoding": "changes replace what was there, element by element",
    "update-weight-delta-checksum": "a sample of every tensor is always checked",
    "update-weight-local-checkpoint-dir": "engines keep what changes are made to in their TMPDIR",
    "=use-mcore-models": "there are no others",
    "=use-flash-attn": "--attention-backend chooses",
    "=no-create-attention-mask-in-dataloader": "no attention mask is ever made",
    "=log-throughput": "throughput is always logged",
    "=auto-detect-ckpt-format": "the format of a checkpoint is always detected",
    "=use-persistent-ckpt-worker": "--async-save uses one process a checkpoint",
    "=override-opt_param-scheduler": "the flags of this start always decide",
    "=use-dist-ckpt": "--ckpt-format chooses",
    "=enable-experimental": "megatron-core asks for it itself",
    "=log-multi-turn": "every message and turn is in the rollout files",
    "=log-passrate": "pass rates are always logged",
}
IGNORED = {name.removeprefix("="): why for name, why in _WHY.items()}
_SWITCHES = {name[1:] for name in _WHY if name.startswith("=")}
_SEVERAL = {"spec"}


class _Ignore(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = (option_string or "").removeprefix("--")
        namespace.ignored_flags = sorted({*getattr(namespace, "ignored_flags", []), name})


def add_ignored_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that the parser does not have; `--help` does not show them."""
    parser.set_defaults(ignored_flags=[])
    for name in IGNORED:
        if f"--{name}" not in parser._option_string_actions:
            parser.add_argument(
                f"--{name}",
                action=_Ignore,
                nargs=0 if name in _SWITCHES else "+" if name in _SEVERAL else None,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def remarks(args: argparse.Namespace) -> list[str]:
    """One line for every flag that was given and is ignored."""
    return [f"--{name} is ignored: {IGNORED[name]}" for name in getattr(args, "ignored_flags", [])]
