"""Megatron's flags: launch scripts as they are, what is handed on, what is refused, a Megatron-LM on PYTHONPATH."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.run_files import LEAST

from rltrain import arguments
from rltrain.arguments.engine_names import RENAMED, engine_flags
from rltrain.arguments.megatron_names import (
    HANDED_ON,
    MegatronFlag,
    flags_used,
    given,
    installed_version,
    read_parser,
    refusal,
    release_of,
    snapshot,
    snapshot_versions,
)
from rltrain.run.errors import UserError
from rltrain.tools.snapshot_megatron_flags import installed_flags, to_lines, updated

SCRIPTS = Path(__file__).parents[1] / "launch_scripts"


def script_arguments(name: str) -> list[str]:
    done = subprocess.run(["bash", SCRIPTS / name], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_a_dense_launch_script_parses_unchanged() -> None:
    args = arguments.parse(script_arguments("qwen3_4b.sh"))
    assert (args.shape.num_layers, args.parallel.tensor_model_parallel_size, args.optimizer.lr) == (
        36,
        2,
        1e-6,
    )
    assert (args.training.global_batch_size, args.training.num_steps_per_rollout) == (256, 1)
    assert args.engines.sglang == {"mem_fraction_static": 0.7}
    assert given(args.model, "transformer") == {
        "attention_softmax_in_fp32": True,
        "attention_backend": "flash",
    }


def test_a_mixture_of_experts_launch_script_parses_unchanged() -> None:
    args = arguments.parse(script_arguments("qwen3_30b_a3b.sh"))
    assert (args.shape.num_experts, args.shape.moe_layer_freq, args.parallel.expert_model_parallel_size) == (
        128,
        "([1]*48)",
        8,
    )
    assert (
        given(args.model, "transformer").items()
        >= {"moe_grouped_gemm": True, "moe_router_dtype": "fp32"}.items()
    )
    # The script has the name that its SGLang knew.
    assert args.engines.sglang["cuda_graph_bs_decode"] == [1, 2, 4, 8, 16, 24, 32]
    assert (
        "--sglang-cuda-graph-bs is taken as --sglang-cuda-graph-bs-decode, its name in SGLang since 0.5.14"
        in arguments.remarks(args)
    )
    assert given(args.model, "optimizer") == {
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
        arguments.parse([*LEAST, *flags])
    assert words in str(caught.value)


def test_flags_without_effect_are_said_to_be_ignored() -> None:
    args = arguments.parse([*LEAST, "--seq-length", "4096", "--use-mcore-models"])
    assert arguments.remarks(args) == [
        "--seq-length is ignored: sequences are packed at their own lengths",
        "--use-mcore-models is ignored: only megatron-core's models exist here",
    ]
    assert arguments.remarks(arguments.parse(LEAST)) == []


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_of_sglangs_flags_are_taken_and_said(old: str) -> None:
    now = RENAMED[old]
    kind = engine_flags()["sglang"][now.name]  # fails if it has been renamed again
    values = [] if now.value or kind == "bool" else [[*now.values, "8"][0]]
    config = arguments.parse([*LEAST, f"--sglang-{old}", *values])
    wanted = {"bool": True, "int": 8, "ints": [8]}.get(kind, now.value or now.values.get("in-seq-split", "8"))
    assert config.engines.sglang == {now.name.replace("-", "_"): wanted}
    said = f"--sglang-{now.name}{f' {now.value}' if now.value else ''}, its name in SGLang since {now.since}"
    assert arguments.remarks(config) == [f"--sglang-{old} is taken as {said}"]


def test_slimes_spellings_of_a_router_flag_and_an_evaluation_set() -> None:
    config = arguments.parse(
        [*LEAST, "--sglang-router-request-timeout-secs", "60", "--eval-prompt-data", "dev.jsonl"]
    )
    assert config.engines.router == {"request_timeout_secs": 60} and config.engines.sglang == {}
    (only,) = config.evaluation.eval_datasets
    assert (only["name"], only["path"]) == ("eval", str(Path("dev.jsonl").absolute()))


def test_the_present_name_is_taken_without_a_word() -> None:
    config = arguments.parse([*LEAST, "--sglang-cuda-graph-bs-decode", "1", "2"])
    assert config.engines.sglang == {"cuda_graph_bs_decode": [1, 2]} and arguments.remarks(config) == []


def test_a_wandb_key_is_stored_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "before")
    args = arguments.parse([*LEAST, "--wandb-key", "secret-1234"])
    assert "secret-1234" not in str(args.values())
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

    from rltrain.arguments.megatron_names import find_megatron_lm

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


def test_a_megatron_lm_on_the_path_brings_its_flags(
    megatron_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment stays as it was: a job inherits it, on nodes whose GPUs compile what this machine need not."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    args = arguments.parse([*LEAST, "--moe-deepep-num-sms-2", "7"])
    assert given(args.model, "transformer") == {"moe_deepep_num_sms": 7}
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    with pytest.raises(UserError) as caught:
        arguments.parse([*LEAST, "--heads-of-another-kind", "7"])
    assert f"is a flag of Megatron 9.9.9 ({megatron_lm})" in str(caught.value)


def test_a_megatron_lm_that_needs_a_driver_leaves_the_stored_list(megatron_lm: Path) -> None:
    text = "raise OSError('libcuda.so.1: cannot open shared object file')"
    (megatron_lm / "megatron/training/arguments.py").write_text(text)
    assert given(arguments.parse([*LEAST, "--moe-deepep-num-sms", "7"]).model, "transformer")
    assert flags_used().startswith("megatron-core 0.")
    assert f"{megatron_lm} is not used: importing it fails with OSError: libcuda.so.1" in flags_used()


def test_the_flags_of_the_wheel_are_not_imported(megatron_lm: Path) -> None:
    (megatron_lm / "megatron_core-9.9.9.dist-info").mkdir()
    with pytest.raises(UserError, match="unknown flag --heads-of-another-kind"):
        arguments.parse([*LEAST, "--heads-of-another-kind", "7"])
    assert "(stored list)" in flags_used()


def test_releases_that_lack_a_refused_flag_are_known() -> None:
    assert refusal("fp8-format") == (
        "--fp8-format is a flag of Megatron that this trainer does not support; remove it."
    )
    newer = next(flag.name for flag in snapshot() if flag.versions == ("0.19",) and flag.config == "-")
    assert f"--{newer} is a flag of Megatron 0.19 that" in str(refusal(newer))
    assert refusal("heads-of-another-kind") is None


def test_only_the_lines_of_one_release_are_replaced() -> None:
    both = MegatronFlag("a", "a", "ddp", "int", (), ("0.16", "0.19"))
    gone = MegatronFlag("b", "b", "-", "on", (), ("0.19",))
    changed = [MegatronFlag("a", "a", "ddp", "int"), MegatronFlag("c", "c", "ddp", "choice", ("x", "y"))]
    assert updated([both, gone], changed, "0.19.3") == ["a a ddp int 0.16,0.19", "c c ddp choice 0.19 x y"]
    assert updated([both], [], "0.19.3") == ["a a ddp int 0.16"]


@pytest.mark.slow
def test_the_stored_list_is_that_of_the_installed_megatron_core() -> None:
    version = installed_version()
    assert version
    assert to_lines(snapshot()) == updated(snapshot(), installed_flags(), version)
    assert release_of(version) in [release_of(each) for each in snapshot_versions()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("megatron.training") is None, reason="the wheel has no megatron.training")
def test_the_parser_that_is_read_is_that_of_parse_args(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flags = read_parser()
    from megatron.training.arguments import parse_args

    found: list[argparse.ArgumentParser] = []

    def look(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        found.append(parser)
        return parser

    monkeypatch.setattr("sys.argv", ["x"])
    parse_args(look)
    options = {option.removeprefix("--") for option in found[0]._option_string_actions}
    assert options - {"-h", "help"} == set(flags)


def test_a_wheel_with_megatron_training_is_not_imported_to_parse() -> None:
    code = f"""
import sys
from rltrain import arguments
arguments.parse({LEAST!r})
assert not {{"torch", "megatron"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
