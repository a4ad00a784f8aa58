"""`python -m rltrain.arguments`: values with their sources, exit codes, and what it may import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_arguments_models import PUBLISHED

from rltrain import arguments
from rltrain.arguments import UserError, flags
from rltrain.arguments.explain import configuration, to_toml
from rltrain.arguments.model_flags import megatron_shape

BASE = ["--prompt-data", "/p.jsonl", "--rollout-batch-size", "4", "--num-rollout", "3"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PUBLISHED["qwen3-0.6B"]))
    return directory


def lines(*argv: str) -> dict[str, str]:
    """Name → the rest of its line."""
    text = to_toml(configuration(argv))
    return dict(line.split(" = ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_every_value_says_where_it_comes_from(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('lr = 1e-5\nseed = 7\n[slurm]\nmem = "1G"')
    found = lines(
        "@qwen3-0.6B.toml", f"@{recipe}", "--hf-checkpoint", str(model), *BASE, "--lr", "2e-6",
        "--sglang-mem-fraction-static", "0.5", "--moe-router-dtype", "fp32", "--seq-length", "1",
        "--disable-rewards-normalization", "--apply-chat-template-kwargs", '{"a": 1}',
    )  # fmt: skip
    assert found["lr"] == "2e-06  # flag"
    assert found["seed"] == f"7  # recipe @{recipe}"
    assert found["num-layers"] == "28  # recipe @qwen3-0.6B.toml"
    assert found["add-qkv-bias"] == "false  # config.json: architectures"
    assert found["global-batch-size"] == "4  # worked out"
    assert found["rollout-top-p"] == "1.0  # default"
    assert found["disable-rewards-normalization"] == "true  # flag"
    assert found["sglang-mem-fraction-static"] == "0.5  # flag"
    assert found["moe-router-dtype"] == '"fp32"  # flag'
    assert found["apply-chat-template-kwargs"] == '"{\\"a\\": 1}"  # flag'


def test_the_output_is_a_recipe_for_the_same_configuration(model: Path) -> None:
    more = '--disable-grpo-std-normalization --sglang-cuda-graph-bs-decode 1 2 --rollout-stop a c"'
    argv = ["@qwen3-0.6B", "--hf-checkpoint", str(model), *BASE, *more.split(), "--attention-backend=flash"]
    found = configuration(argv)
    known = [option.removeprefix("--") for option in arguments.known_flags()]
    again = arguments.parse(flags.to_argv(flags.from_toml(to_toml(found), "output", known)))
    ours, theirs = found.config.values(), again.values()
    filled_in = {name for name in ours if ours[name] is None and theirs[name] is not None}
    from_config = {flag.replace("-", "_") for flag in megatron_shape(PUBLISHED["qwen3-0.6B"])}
    assert filled_in <= from_config
    for name in ours.keys() - filled_in:
        assert ours[name] == theirs[name], name


def test_contradictions_name_the_recipe(model: Path) -> None:
    with pytest.raises(UserError, match=r"--num-layers 36 \(recipe @qwen3-4B\) contradicts .*makes it 28"):
        configuration(["@qwen3-4B", "--hf-checkpoint", str(model), *BASE])


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', *sys.argv[1:]]\n"
        "try: runpy.run_module('rltrain.arguments', run_name='__main__')\n"
        "finally: assert not {'torch', 'megatron', 'sglang', 'transformers'} & sys.modules.keys()"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


def test_exit_codes_and_no_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('partition = "gpu"\nlr = 1e-5')  # how the job is started is not a matter of training
    done = run(f"@{recipe}", "--hf-checkpoint", "/nowhere", *BASE)
    assert done.returncode == 0, done.stderr
    assert f"lr = 1e-05  # recipe @{recipe}" in done.stdout and "partition" not in done.stdout
    assert "# --hf-checkpoint /nowhere is not on this machine" in done.stdout
    assert done.stdout.startswith("# Megatron's flags come from megatron-core ")
    done = run("--hf-checkpoint", "/nowhere", *BASE, "--lrr", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --lrr: did you mean --lr?\n"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    argv = ["--hf-checkpoint", "/m", *BASE, "--sglang-admin-api-key", "s3cret", "--wandb-key", "s3cret"]
    found: Any = to_toml(configuration(argv))
    assert "s3cret" not in found and 'sglang-admin-api-key = "***"' in found


def test_precision_is_left_to_submit_unless_it_is_given(model: Path) -> None:
    argv = ["--hf-checkpoint", str(model), *BASE]
    text = to_toml(configuration(argv))
    assert "# bf16 is not given: true where the trainer has GPUs, false on a CPU" in text
    assert not {"bf16", "use-distributed-optimizer"} & lines(*argv).keys()
    assert lines(*argv, "--no-bf16")["bf16"] == "false  # flag"
    assert "# bf16" not in to_toml(configuration([*argv, "--no-bf16"]))
