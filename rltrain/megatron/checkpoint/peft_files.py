"""LoRA's adapters as PEFT reads them: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file

from rltrain.arguments.config import Config
from rltrain.arguments.groups.training import Lora
from rltrain.arguments.hf_config import ModelShape
from rltrain.arguments.model_flags import lora_modules
from rltrain.megatron.checkpoint.resume import initial_source
from rltrain.megatron.model.export import export_adapters
from rltrain.megatron.ranks import together
from rltrain.run.files import put_in_place

_PREFIX = "base_model.model."


def write_adapters(directory: Path, models: list[GPTModel], shape: ModelShape, config: Config) -> None:
    """Write the model's adapters, in place of what has the name `directory`; all ranks call it together.

    Raises:
        OSError: it can't be written, on every rank; what was there is untouched.
    """
    tensors = {_PREFIX + name: tensor.cpu().contiguous() for name, tensor in export_adapters(models, shape)}
    base = initial_source(config.checkpoint, config.model).hf_directory  # all ranks look
    settings = _settings(config.lora, shape, base)
    together(lambda: _write(directory, tensors, settings) if dist.get_rank() == 0 else None, OSError)


def _write(directory: Path, tensors: dict[str, Any], settings: dict[str, Any]) -> None:
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
    (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    put_in_place(temporary, directory)


def _settings(lora: Lora, shape: ModelShape, base: Path | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if base else None,
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "target_modules": [name for name in lora_modules(shape) if lora.is_target(name)],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
