"""Which form of quantised weights a `config.json` names, and whether the trainer can write it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rltrain.run.errors import UserError

# Beside each weight that is quantised lies a tensor with its scales.
SCALE_SUFFIX = "_scale_inv"

# Without `save_original_format=False` transformers 5 gives the experts' tensors names that nothing can read.
_FROM_MXFP4 = (
    "Write them in bf16 with transformers: `model = AutoModelForCausalLM.from_pretrained(DIR, dtype='bfloat16',"
    " quantization_config=Mxfp4Config(dequantize=True))`, `model.save_pretrained(NEW, save_original_format=False)`, and"
    " copy the tokenizer's files."
)

_BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": None}


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks of block FP8, the form of DeepSeek-V3; None where no weights are quantised.

    Args:
        config: The parsed `config.json`.

    Raises:
        UserError: weights are quantised in another form.
    """
    form = config.get("quantization_config")
    if not form:
        return None
    given: dict[str, Any] = form if isinstance(form, dict) else {}
    block: Any = given.get("weight_block_size")
    is_block = (
        isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block)
    )
    if not is_block or any(given.get(key) not in (value, None) for key, value in _BLOCK_FP8.items()):
        method = given.get("quant_method")
        advice = _FROM_MXFP4 if method == "mxfp4" else "Give the model's bf16 weights."
        raise UserError(
            f"the model's config.json sets quantization_config ({method or form}): quantised weights can't be trained,"
            " and for engines only block FP8 can be written (fp8, e4m3, dynamic, with weight_block_size and"
            f" without scale_fmt). {advice}"
        )
    return block[0], block[1]
