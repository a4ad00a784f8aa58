"""--custom-model-provider-path: a function of the user that builds the model in place of ours."""

from __future__ import annotations

import argparse
import inspect

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from rltrain.arguments.errors import UserError
from rltrain.functions import load_function

_FLAG = "--custom-model-provider-path"


def custom_model(
    args: argparse.Namespace,
    config: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    """This rank's chunk of the model, as the user's function builds it.

    It is called as slime calls it, with `pre_process` and `post_process`, and with `vp_stage` if it takes that.
    `config` and `args` are given to functions that have such parameters too, because there is no global state
    to get them from.

    Raises:
        UserError: it returned something that is no GPTModel.
    """
    function = load_function(args.custom_model_provider_path, flag=_FLAG)
    optional = {"vp_stage": vp_stage, "config": config, "args": args}
    taken = inspect.signature(function).parameters
    own = {name: value for name, value in optional.items() if name in taken}
    model = function(pre_process=pre_process, post_process=post_process, **own)
    if not isinstance(model, GPTModel):
        raise UserError(
            f"{_FLAG} {args.custom_model_provider_path} returned a {type(model).__name__}, where one of"
            " megatron-core's GPTModel is wanted."
        )
    return model
