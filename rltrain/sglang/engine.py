"""The engine role: `python -m rltrain.sglang.engine` runs one SGLang server and joins it to the router."""

from __future__ import annotations

import argparse
from typing import Any

from rltrain import arguments
from rltrain.runtime import Registry, RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.role import run_server_role


def engine_server_args(args: argparse.Namespace, index: int) -> dict[str, Any]:
    """`ServerArgs` of engine number `index`: what the job decides, then what `--sglang-*` flags say."""
    decided = {
        "model_path": args.hf_checkpoint,
        "tp_size": args.rollout_num_gpus_per_engine,
        # Engines with one seed would all draw the same tokens for the same prompt.
        "random_seed": args.seed + index,
    }
    if args.random_init:
        decided["load_format"] = "dummy"  # there are no weights yet: the trainer sends them
    return {**decided, **args.sglang}


def main(context: RoleContext) -> None:
    """Start the engine, join the router, announce it, and watch it."""
    args = arguments.load(context.run_dir)
    registry = Registry(context)
    server_args = engine_server_args(args, context.index)
    with HttpServerEngineAdapter.launch(server_args, context.token, host=context.host) as engine:
        router = registry.wait_for("router")[0]
        engine.register(router.url)
        registry.register(engine.url)
        engine.wait()


if __name__ == "__main__":
    run_server_role(main)
