"""Megatron's flags: launch scripts as they are, what is handed on, what is refused, a Megatron-LM on PYTHONPATH."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from rltrain import arguments
from rltrain.arguments import UserError
from rltrain.arguments.megatron_config import HANDED_ON, given, snapshot

SCRIPTS = Path(__file__).with_name("launch_scripts")
BASE = [
    "--hf-checkpoint",
    "model",
    "--prompt-data",
    "p.jsonl",
    "--rollout-batch-size",
    "4",
    "--num-rollout",
    "3",
]


def script_arguments(name: str) -> list[str]:
    done = subprocess.run(["bash", SCRIPTS / name], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_a_dense_launch_script_parses_unchanged() -> None:
    args = arguments.parse(script_arguments("qwen3_4b.sh"))
    assert (args.num_layers, args.tensor_model_parallel_size, args.lr) == (36, 2, 1e-6)
    assert (args.global_batch_size, args.num_steps_per_rollout) == (256, 1)
    assert args.sglang == {"mem_fraction_static": 0.7}
    assert given(args, "transformer") == {"attention_softmax_in_fp32": True, "attention_backend": "flash"}


def test_a_mixture_of_experts_launch_script_parses_unchanged() -> None:
    args = arguments.parse(script_arguments("qwen3_30b_a3b.sh"))
    assert (args.num_experts, args.moe_layer_freq, args.expert_model_parallel_size) == (128, "([1]*48)", 8)
    assert (
        given(args, "transformer").items() >= {"moe_grouped_gemm": True, "moe_router_dtype": "fp32"}.items()
    )
    assert given(args, "optimizer") == {
        "optimizer_cpu_offload": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }


def test_every_field_that_is_handed_on_has_a_flag() -> None:
    fields = {config: {flag.field for flag in snapshot() if flag.config == config} for config in HANDED_ON}
    for config, handed_on in HANDED_ON.items():
        assert not handed_on - fields[config] - {"cp_comm_type"}, config


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fp8-format", "e4m3"], "--fp8-format is a flag of Megatron that this trainer does not support"),
        (["--moe-router-topkk", "8"], "did you mean --moe-router-topk?"),
        (["--attention-backend", "flesh"], "--attention-backend: invalid choice: 'flesh'"),
        (["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "3"], "say the same thing"),
        (["--lr-warmup-fraction", "1"], "between 0 and 1"),
        (["--lr-decay-style", "WSD"], "needs --lr-wsd-decay-iters"),
        (["--weight-decay-incr-style", "linear"], "needs --start-weight-decay"),
        (["--end-weight-decay", "1"], "need --weight-decay-incr-style"),
    ],
)
def test_refusals(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        arguments.parse([*BASE, *flags])
    assert words in str(caught.value)


def test_flags_without_effect_are_said_to_be_ignored() -> None:
    args = arguments.parse([*BASE, "--seq-length", "4096", "--use-mcore-models"])
    assert arguments.remarks(args) == [
        "--seq-length is ignored: sequences are packed, each as long as it is",
        "--use-mcore-models is ignored: there are no others",
    ]
    assert arguments.remarks(arguments.parse(BASE)) == []


def test_a_wandb_key_is_stored_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "before")
    args = arguments.parse([*BASE, "--wandb-key", "secret-1234"])
    assert "secret-1234" not in str(vars(args))
    import os

    assert os.environ["WANDB_API_KEY"] == "secret-1234"


FAKE_MEGATRON = """
def add_megatron_arguments(parser):
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--moe-deepep-num-sms-2", dest="moe_deepep_num_sms", type=int)
    parser.add_argument("--heads-of-another-kind", type=int)
    return parser
"""


@pytest.fixture
def megatron_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake Megatron-LM on the path: two flags that megatron-core does not have."""
    import sys

    from rltrain.arguments.megatron_training import find_megatron_lm

    for folder, text in {"": "", "core": "__version__ = '9.9.9'", "training": ""}.items():
        (tmp_path / "megatron" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "megatron" / folder / "__init__.py").write_text(text)
    (tmp_path / "megatron/training/arguments.py").write_text(FAKE_MEGATRON)
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "megatron"}
    for name in loaded:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    find_megatron_lm.cache_clear()
    yield tmp_path
    find_megatron_lm.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        del sys.modules[name]
    sys.modules.update(loaded)


def test_a_megatron_lm_on_the_path_brings_its_flags(megatron_lm: Path) -> None:
    args = arguments.parse([*BASE, "--moe-deepep-num-sms-2", "7"])
    assert given(args, "transformer") == {"moe_deepep_num_sms": 7}
    with pytest.raises(UserError) as caught:
        arguments.parse([*BASE, "--heads-of-another-kind", "7"])
    assert f"is a flag of Megatron 9.9.9 ({megatron_lm})" in str(caught.value)


@pytest.mark.slow
def test_the_stored_list_is_that_of_the_installed_megatron_core() -> None:
    from rltrain.arguments.megatron_snapshot import SNAPSHOT, installed_flags

    assert SNAPSHOT.read_text().splitlines() == installed_flags()
