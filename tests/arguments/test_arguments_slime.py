"""What slime's launch scripts ask for in slime's own way, and what is said where it differs here."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.run_files import LEAST

from hpc.planning.job_plan import make_plan
from hpc.planning.nodes import make_ask, read_cluster_flags, split_nodes
from hpc.submitting.start_run import describe
from rltrain import arguments
from rltrain.arguments import flags
from rltrain.arguments.fleet import engine_specs
from rltrain.rollout.train_data.metrics import category_metrics, correct_metrics
from rltrain.run.errors import UserError
from rltrain.sample import Sample


def test_a_run_without_rollouts_evaluates_whatever_the_other_flags_say() -> None:
    only = ["--num-rollout", "0", "--eval-prompt-data", "dev", "dev.jsonl", "--skip-eval-before-train"]
    evaluation = arguments.parse([*LEAST, *only]).evaluation
    assert (evaluation.eval_interval, evaluation.skip_eval_before_train) == (1, False)
    with pytest.raises(UserError, match="--num-rollout 0 only evaluates: it needs --eval-prompt-data"):
        arguments.parse([*LEAST, "--num-rollout", "0"])


def test_without_gpus_for_engines_there_is_only_a_router() -> None:
    config = arguments.parse([*LEAST, "--rollout-num-gpus", "0"])
    assert engine_specs(config.engines, config.debug) == []
    roles = [line.partition(":")[0] for line in describe(make_plan(config)).splitlines()]
    assert roles == ["router-0", "rollout-0", "trainer-0"]
    split = split_nodes(make_ask(read_cluster_flags({"rollout-num-gpus": ["0"]}), 2, None), 8, 8)
    assert (split.trainer_nodes, split.rollout_nodes, split.trainer_gpus) == (2, 0, 8)


def test_names_of_torch_files_stand_for_parquet_files_and_that_is_said() -> None:
    config = arguments.parse([*LEAST, "--save-debug-rollout-data", "/data/{rollout_id}.pt"])
    assert config.debug.save_debug_rollout_data == "/data/{rollout_id}.parquet"
    assert arguments.remarks(config) == [
        "--save-debug-rollout-data writes Parquet, one row per sample, not torch's format:"
        " /data/{rollout_id}.parquet"
    ]
    loaded = arguments.parse([*LEAST, "--load-debug-rollout-data", "/data/{rollout_id}.pt"])
    assert loaded.debug.load_debug_rollout_data == "/data/{rollout_id}.parquet"


@pytest.mark.parametrize("flag", ["--no-load-args", "--no-load-scheduler", "--no-rng", "--peft-method"])
def test_a_flag_that_nobody_here_has_is_not_taken_for_another_one(flag: str) -> None:
    with pytest.raises(UserError, match=f"unknown flag {flag}; see --help"):
        arguments.parse([*LEAST, flag])


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("top_p: 2", "top_p is 2: it must be at most 1"),
        ("temperature: -1", "temperature is -1: it must be at least 0"),
        ("temperature: .nan", "temperature is nan: a number is needed"),
        ("n_samples_per_eval_prompt: 0", "n_samples_per_eval_prompt is 0: it must be at least 1"),
        ("max_response_len: 2.5", "max_response_len is 2.5; it must be a number without a fraction"),
        ("max_response_len: many", "max_response_len is 'many'; it must be a number without a fraction"),
    ],
)
def test_numbers_of_an_evaluation_set_have_the_limits_of_their_flags(
    setting: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(f"eval: {{datasets: [{{name: dev, path: dev.jsonl, {setting}}}]}}")
    with pytest.raises(UserError, match=f"--eval-config {file}: set 'dev': {problem}"):
        arguments.parse([*LEAST, "--eval-config", str(file)])


def test_epochs_beside_a_number_of_rollouts_change_nothing_and_that_is_said() -> None:
    config = arguments.parse([*LEAST, "--num-epoch", "2"])
    assert arguments.remarks(config) == ["--num-epoch has no effect: --num-rollout sets the run's length"]


def test_settings_of_an_evaluation_set_that_no_flag_has(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    text = "eval: {datasets: [{name: dev, path: dev.jsonl, min_eval_samples: %s, metadata_overrides: {split: dev}}]}"
    file.write_text(text % 3)
    (only,) = arguments.parse([*LEAST, "--eval-config", str(file)]).evaluation.eval_datasets
    assert (only["min_eval_samples"], only["metadata_overrides"]) == (3, {"split": "dev"})
    file.write_text(text % 0)
    with pytest.raises(UserError, match="min_eval_samples is 0; it must be a number of samples, at least 1"):
        arguments.parse([*LEAST, "--eval-config", str(file)])


def test_flags_of_slimes_memory_are_refused_with_the_reason_or_said_to_be_ignored() -> None:
    with pytest.raises(
        UserError, match=r"--use-stateless-adam .* megatron-core has no Adam without averages"
    ):
        arguments.parse([*LEAST, "--use-stateless-adam"])
    (line,) = arguments.remarks(arguments.parse([*LEAST, "--recompute-loss-function"]))
    assert "--recompute-loss-function is ignored: the loss stores no tensor as large as the logits" in line


def test_engines_that_draft_are_said_to_keep_their_weights() -> None:
    trained = [*LEAST, "--enable-mtp-training"]
    drafts = ["--sglang-speculative-algorithm", "EAGLE"]
    (line,) = arguments.remarks(arguments.parse([*trained, *drafts]))
    assert line.startswith("--enable-mtp-training: engines draft with the weights that they started with")
    for given in (trained, [*LEAST, *drafts], [*trained, *drafts[:1], "NGRAM"]):
        assert arguments.remarks(arguments.parse(given)) == []


@pytest.mark.parametrize("scheduler", ["opt_param-scheduler", "opt-param-scheduler"])
def test_megatrons_spelling_of_the_flags_of_the_schedule(scheduler: str) -> None:
    """Megatron's own spelling has underscores inside: as in a launch script, and as in a recipe."""
    _, given = flags.split([f"--override-{scheduler}"])
    (line,) = arguments.remarks(arguments.parse([*LEAST, *flags.to_argv(given)]))
    assert line == "--override-opt-param-scheduler is ignored: the flags of the current start always apply"
    recipe = flags.from_toml(f"use-checkpoint-{scheduler} = true", "recipe.toml")
    with pytest.raises(UserError, match="a resumed run keeps its own flags, schedule included"):
        arguments.parse([*LEAST, *flags.to_argv(recipe)])


def test_no_flag_of_slime_meets_a_bare_refusal() -> None:
    """Every flag that slime's own parser has and ours lacks says why, or what to use instead."""
    for name, words in {
        "train-env-vars": "export the variables",
        "min-batch-collection-ratio": "--agent-command",
        "ci-test": "compared with the engines' in every step",
        "update-weight-disk-dir": "in the run directory",
        "http-proxy": "export https_proxy",
        "release-train": "--offload-train",
    }.items():
        with pytest.raises(UserError, match=f"--{name} is not supported: .*{words}"):
            arguments.parse([*LEAST, f"--{name}"])
    given = ["--data-pad-size-multiplier", "128", "--use-distributed-post", "--disable-wandb-random-suffix",
             "--wandb-always-use-train-step"]  # fmt: skip
    lines = arguments.remarks(arguments.parse([*LEAST, *given]))
    assert [line.partition(" is ignored: ")[0] for line in lines] == sorted(set(given) - {"128"})


def test_details_are_rollouts_and_what_was_trained_on() -> None:
    debug = arguments.parse([*LEAST, "--dump-details", "/data/a{b}"]).debug
    assert debug.save_debug_rollout_data is not None and debug.save_debug_train_data is not None
    assert debug.save_debug_rollout_data.format(rollout_id=3) == "/data/a{b}/rollout_data/3.parquet"
    assert debug.save_debug_train_data.format(rollout_id=3, rank=1) == "/data/a{b}/train_data/3_1.parquet"
    own = ["--dump-details", "/data", "--save-debug-rollout-data", "/own/{rollout_id}.parquet"]
    assert arguments.parse([*LEAST, *own]).debug.save_debug_rollout_data == "/own/{rollout_id}.parquet"


def test_a_run_without_prompts_needs_functions_that_fill_its_samples() -> None:
    least = [word for word in LEAST if word not in LEAST[LEAST.index("--prompt-data") :][:2]]
    without = [*least, "--disable-rollout-global-dataset"]
    with pytest.raises(UserError, match="Fill them with --custom-generate-function-path"):
        arguments.parse(without)
    filled = [*without, "--custom-generate-function-path", "a.b"]
    with pytest.raises(UserError, match="--prompt-data or --prompt-data-mix: leave one of them out"):
        arguments.parse([*filled, "--prompt-data", "p.jsonl"])
    assert arguments.parse(filled).namespace.rollout_global_dataset is False


def test_metrics_of_categories_and_of_correct_samples() -> None:
    config = arguments.parse([*LEAST, "--log-reward-category", "why", "--log-correct-samples"])
    assert (config.tracking.log_reward_category, config.tracking.log_correct_samples) == ("why", True)
    samples = [
        Sample(response_length=length, reward={"score": score, "why": why})
        for length, score, why in [(2, 1.0, "ok"), (4, 0.0, "format"), (6, 1.0, "ok"), (8, 1.0, "slow")]
    ]
    assert category_metrics("why", [*samples, Sample(reward=None)]) == {
        "rollout/error_cat/format": 0.2, "rollout/error_cat/ok": 0.4, "rollout/error_cat/slow": 0.2,
    }  # fmt: skip
    correct = correct_metrics(samples, [1.0, 0.0, 1.0, 1.0])
    assert correct["rollout/correct_ratio"] == 0.75
    lengths = [correct[f"rollout/correct_response_length_p{each}"] for each in (25, 50, 75, 100)]
    assert lengths == [2.0, 6.0, 8.0, 8.0] and correct["rollout/correct_response_length"] == 16 / 3
    assert correct_metrics(samples, [None] * 4) == {"rollout/correct_ratio": 0.0}


def test_flags_of_a_profiler_that_is_off_are_named() -> None:
    off = ["--profile-step-start", "3", "--memory-recorder", "memray"]
    said = [
        line
        for line in arguments.remarks(arguments.parse([*LEAST, *off]))
        if "changes nothing without" in line
    ]
    assert said == [
        "--profile-step-start changes nothing without --use-pytorch-profiler",
        "--memory-recorder changes nothing without --record-memory-history",
    ]
    on = [*LEAST, *off, "--use-pytorch-profiler", "--record-memory-history"]
    assert not [line for line in arguments.remarks(arguments.parse(on)) if "changes nothing without" in line]
