"""Training flags: what follows from what, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.megatron import tiny_config
from helpers.run_files import LEAST

from rltrain import arguments
from rltrain import inputs as input_files
from rltrain.run.errors import UserError


def parse(*more: str) -> object:
    return arguments.parse([*LEAST, *more])


def refusal(*more: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "batch", "steps"),
    [
        ([], 8, 1),
        (["--global-batch-size", "4"], 4, 2),
        (["--num-steps-per-rollout", "4"], 2, 4),
        (["--num-steps-per-rollout", "2", "--global-batch-size", "4"], 4, 2),
    ],
)
def test_batch_arithmetic_is_completed(flags: list[str], batch: int, steps: int) -> None:
    args = parse("--n-samples-per-prompt", "2", *flags)
    assert (args.training.global_batch_size, args.training.num_steps_per_rollout) == (batch, steps)


def test_batch_arithmetic_that_contradicts_itself_shows_all_numbers() -> None:
    message = refusal(
        "--n-samples-per-prompt", "2", "--global-batch-size", "4", "--num-steps-per-rollout", "3"
    )
    for part in ("--rollout-batch-size 4", "--n-samples-per-prompt 2", "= 8", "= 12"):
        assert part in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-size", "3"], "not a multiple of --global-batch-size 3"),
        (["--tensor-model-parallel-size", "2"], "does not divide the 1 trainer ranks"),
        (["--actor-num-gpus-per-node", "3"], "not a multiple of --micro-batch-size"),
        (["--use-dynamic-batch-size"], "needs --max-tokens-per-gpu"),
        (["--rollout-num-gpus", "3", "--rollout-num-gpus-per-engine", "2"], "not a multiple of"),
        (["--eval-interval", "2"], "needs --eval-prompt-data"),
        (["--eval-prompt-data", "a", "b", "c"], "pairs"),
        (["--num-rollout", "-1"], "--num-rollout is -1: it must be at least 0"),
        (["--eval-prompt-data", "../x", "f"], "becomes a directory"),
        (["--eval-prompt-data", "a", "b", "--debug-train-only"], "needs engines"),
        (["--kl-coef", "0.1"], "--use-kl-loss"),
        (["--eps-clip-c", "0.5"], "greater than 1"),
        (["--rollout-temperature", "0"], "must be positive"),
        (["--micro-batch-size", "0"], "at least 1"),
        (["--rolout-seed", "1"], "did you mean --rollout-seed?"),
        (["--sglang-mem-fration-static", "0.5"], "did you mean --sglang-mem-fraction-static?"),
        (["--router-polcy", "random"], "did you mean --router-policy?"),
        (["--sglang-port", "1"], "set by the job itself"),
        (["--mask-offpolicy-in-partial-rollout"], "needs --partial-rollout"),
        (["--over-sampling-batch-size", "3"], "less than --rollout-batch-size 4"),
        (["--max-failed-fraction", "2"], "between 0 and 1"),
        (["--train-env-vars", "{}"], "export the variables before it"),
        (["--gamma", "0.9"], "grpo does not discount"),
        (["--gamma", "1.5", "--advantage-estimator", "reinforce_plus_plus"], "between 0 and 1"),
        (["--kl-coef", "0.1", "--advantage-estimator", "rloo"], "reinforce_plus_plus_baseline"),
        (["--use-unbiased-kl"], "needs --use-kl-loss"),
        (["--use-tis", "--use-rollout-logprobs"], "both would correct twice"),
        (["--custom-tis-function-path", "a.b"], "needs --use-tis"),
        (["--use-tis", "--tis-clip-low", "3"], "between 0 and --tis-clip"),
        (["--advantage-estimator", "cispo", "--eps-clip-c", "3"], "no dual clip"),
        (["--advantage-estimator", "vtrace"], "reinforce_plus_plus_baseline"),
        (["stray"], "unexpected argument 'stray'"),
        (["--lr", "fast"], "--lr"),
    ],
)
def test_refusals_name_the_flag(flags: list[str], words: str) -> None:
    assert words in refusal(*flags)


def test_missing_flags_are_named_together() -> None:
    with pytest.raises(
        UserError, match=r"--hf-checkpoint.*--prompt-data.*--rollout-batch-size.*--num-rollout"
    ):
        arguments.parse([])


def test_engine_flags_pass_through_with_their_types() -> None:
    args = parse(
        "--sglang-mem-fraction-static", "0.5", "--sglang-enable-metrics", "--router-policy", "random",
        # SGLang reads these with converters of its own
        "--sglang-max-total-tokens", "16384", "--sglang-extra-metric-labels", '{"a": "b"}',
    )  # fmt: skip
    assert args.engines.sglang == {
        "mem_fraction_static": 0.5,
        "enable_metrics": True,
        "max_total_tokens": 16384,
        "extra_metric_labels": {"a": "b"},
    }
    assert args.engines.router == {"policy": "random"}


def test_two_parses_share_no_state() -> None:
    parse("--sglang-enable-metrics")
    assert parse().engines.sglang == {}


def test_dump_and_load_carry_every_value(tmp_path: Path) -> None:
    import tomli_w

    args = parse(
        "--sglang-enable-metrics", "--rollout-stop", "a", "b", "--apply-chat-template-kwargs", '{"x": 1}'
    )
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"train": arguments.dump(args)}))
    loaded = arguments.load(tmp_path)
    assert loaded.checkpoint.save == str(tmp_path / "checkpoints")
    assert loaded.replace(save=None) == args


def test_paths_do_not_depend_on_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    args = parse("--eval-prompt-data", "held-out", "e.jsonl@[0:4]")
    assert args.data.prompt_data == str(tmp_path / "p.jsonl")
    assert args.evaluation.eval_prompt_data == ["held-out", str(tmp_path / "e.jsonl@[0:4]")]


@pytest.fixture
def inputs(demo_assets: Path, tmp_path: Path) -> dict[str, Path]:
    """A model directory and a prompt file that pass every check."""
    shutil.copytree(demo_assets, tmp_path / "demo")
    return {"model": tmp_path / "demo/model", "prompts": tmp_path / "demo/train.jsonl"}


def check(inputs: dict[str, Path], *more: str) -> str:
    args = arguments.parse([
        "--hf-checkpoint", str(inputs["model"]), "--prompt-data", str(inputs["prompts"]),
        "--rollout-batch-size", "4", "--label-key", "label", "--rm-type", "exact", *more,
    ])  # fmt: skip
    try:
        args = input_files.check_inputs(args)
    except UserError as error:
        return str(error)
    assert not [line for line in arguments.remarks(args) if "--num-epoch" in line]
    return f"fine: {args.rollout.num_rollout}"


def test_good_inputs_pass_and_epochs_become_rollouts(inputs: dict[str, Path]) -> None:
    assert check(inputs, "--random-init", "--num-epoch", "2") == f"fine: {2 * 4600 // 4}"


def test_model_directory_is_checked(inputs: dict[str, Path], tmp_path: Path) -> None:
    more = ["--num-rollout", "1"]
    assert "--random-init" in check(inputs, *more)
    assert "no such directory" in check({**inputs, "model": tmp_path / "nowhere"}, *more)
    assert "no config.json" in check({**inputs, "model": tmp_path}, *more)
    config = json.loads((inputs["model"] / "config.json").read_text())
    (inputs["model"] / "config.json").write_text(
        json.dumps({**config, "architectures": ["MambaForCausalLM"]})
    )
    assert "MambaForCausalLM" in check(inputs, "--random-init", *more)
    (inputs["model"] / "config.json").write_text("{")
    assert "not valid JSON" in check(inputs, "--random-init", *more)


def test_tensor_parallel_size_must_divide_the_heads(inputs: dict[str, Path]) -> None:
    flags = "--random-init --num-rollout 1 --tensor-model-parallel-size 3 --actor-num-gpus-per-node 3"
    message = check(inputs, *flags.split(), "--use-dynamic-batch-size", "--max-tokens-per-gpu", "64")
    assert "3" in message
    assert "4" in message
    assert "heads" in message


def test_code_that_comes_with_a_model_is_the_engines_and_must_be_allowed(inputs: dict[str, Path]) -> None:
    file = inputs["model"] / "config.json"
    mimo = {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "auto_map": {"AutoConfig": "c.MiMoConfig"},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | mimo))
    more = ("--random-init", "--num-rollout", "1")
    assert "--sglang-trust-remote-code" in check(inputs, *more)
    assert check(inputs, *more, "--sglang-trust-remote-code") == "fine: 1"


def test_a_model_that_changes_with_the_length_needs_a_limit(inputs: dict[str, Path]) -> None:
    file = inputs["model"] / "config.json"
    phi = tiny_config("Phi3ForCausalLM", pad_token_id=None, original_max_position_embeddings=64)
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    file.write_text(json.dumps(phi | {"rope_scaling": rope}))
    more = ("--random-init", "--num-rollout", "1")
    assert "Give --rollout-max-context-len 64 or less" in check(inputs, *more)
    assert check(inputs, *more, "--rollout-max-context-len", "64") == "fine: 1"


def test_the_part_of_a_head_that_is_rotated_must_be_where_sglang_reads_it(inputs: dict[str, Path]) -> None:
    file = inputs["model"] / "config.json"
    phi = tiny_config("Phi3ForCausalLM", pad_token_id=None)
    phi["rope_parameters"] = {"rope_theta": phi.pop("rope_theta"), "partial_rotary_factor": 0.5}
    file.write_text(json.dumps(phi))
    more = ("--random-init", "--num-rollout", "1")
    assert "partial_rotary_factor 0.5 in rope_parameters, and 1.0 beside it" in check(inputs, *more)
    file.write_text(json.dumps(phi | {"partial_rotary_factor": 0.5}))
    assert check(inputs, *more) == "fine: 1"


def test_linear_attention_shares_no_prompts_and_engines_need_its_interval(inputs: dict[str, Path]) -> None:
    file = inputs["model"] / "config.json"
    entries = json.loads(file.read_text()) | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
    }
    layers = ["linear_attention", "full_attention"] * (entries["num_hidden_layers"] // 2)
    file.write_text(json.dumps(entries | {"layer_types": layers}))
    more = ("--random-init", "--num-rollout", "1")
    assert 'Add "full_attention_interval": 2.' in check(inputs, *more)
    file.write_text(json.dumps(entries | {"layer_types": layers[::-1]}))
    assert "at no interval" in check(inputs, *more)
    file.write_text(json.dumps(entries | {"layer_types": layers, "full_attention_interval": 2}))
    assert check(inputs, *more) == "fine: 1"
    shared = ("--share-prompts", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096")
    assert "has linear attention" in check(inputs, *more, *shared)


def test_chat_template_must_exist(inputs: dict[str, Path]) -> None:
    assert "no chat template" in check(inputs, "--random-init", "--num-rollout", "1", "--apply-chat-template")


def test_policy_training_needs_a_reward_that_exists(inputs: dict[str, Path]) -> None:
    more = ["--random-init", "--num-rollout", "1"]
    assert "there is no such reward" in check(inputs, *more, "--rm-type", "exakt")
    args = arguments.parse([
        "--hf-checkpoint", str(inputs["model"]), "--prompt-data", str(inputs["prompts"]),
        "--rollout-batch-size", "4", *more,
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"no reward: give --custom-rm-path"):
        args = input_files.check_inputs(args)


def test_reward_function_must_exist(inputs: dict[str, Path]) -> None:
    message = check(
        inputs, "--random-init", "--num-rollout", "1", "--custom-rm-path", "rltrain.demo.task.rewrd"
    )
    assert "--custom-rm-path" in message
    assert "rewrd" in message


@pytest.mark.slow
def test_engine_flag_list_is_that_of_the_installed_packages() -> None:
    from rltrain.tools.snapshot_engine_flags import SNAPSHOT, installed_flags

    assert SNAPSHOT.read_text().splitlines() == installed_flags()
