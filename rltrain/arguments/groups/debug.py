"""Looking into a run: where metrics go; rollouts without a trainer, or a trainer on recorded rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rltrain.arguments.declare import flag
from rltrain.arguments.groups.data import absolute
from rltrain.arguments.groups.functions import Functions
from rltrain.run.errors import UserError

_RECORDED = "rltrain.rollout.train_data.replayed"


@dataclass(frozen=True)
class Tracking:
    """Tracking."""

    use_wandb: bool = flag("log to Weights & Biases, in addition to metrics.jsonl", False)
    wandb_mode: Literal["online", "offline", "disabled"] | None = flag(
        "mode of W&B (default: WANDB_MODE, else offline)"
    )
    wandb_host: str | None = flag("URL of your own W&B server (default: WANDB_BASE_URL)", metavar="URL")
    wandb_dir: str | None = flag("directory for W&B's files (default: the run directory)", metavar="DIR")
    wandb_team: str | None = flag("W&B entity", metavar="NAME")
    wandb_project: str = flag("default: slurmlime", "slurmlime", metavar="NAME")
    wandb_group: str | None = flag("default: none", metavar="NAME")
    wandb_key: str | None = flag(
        "API key, never stored; the variable WANDB_API_KEY is safer: others can read command lines",
        metavar="KEY",
    )
    wandb_run_id: str | None = flag(
        "id of the W&B run (default: generated once, kept for every attempt)", metavar="ID"
    )
    log_reward_category: str | None = flag(
        "entry of a dict reward whose values are counted: rollout/error_cat/VALUE, the share of samples",
        metavar="KEY",
    )
    log_correct_samples: bool = flag("log the lengths of the responses whose reward is at least 1", False)
    use_tensorboard: bool = flag(
        "log to TensorBoard, too: in $TENSORBOARD_DIR, or tensorboard/ of the run", False
    )
    tb_project_name: str | None = flag("directory in tensorboard/ of the run", metavar="NAME")
    tb_experiment_name: str | None = flag("subdirectory of --tb-project-name", metavar="NAME")
    tensorboard_dir: str | None = flag(
        "TensorBoard's directory, for --use-tensorboard's metrics and for traces (default: in the run)",
        metavar="DIR",
        owner="Megatron",
    )

    def mode_of_wandb(self, env: Mapping[str, str]) -> str:
        """online, offline or disabled: `--wandb-mode`, else `$WANDB_MODE`, else online only if asked for."""
        return self.wandb_mode or env.get("WANDB_MODE") or ("online" if self.use_wandb else "offline")


@dataclass(frozen=True)
class Profiling:
    """Profiling."""

    use_pytorch_profiler: bool = flag(
        "write traces of the trainer with torch's profiler: for ui.perfetto.dev, in profile/ of the run",
        False,
        owner="Megatron",
    )
    profile_target: list[Literal["train_overall", "train_actor", "train_log_probs"]] = flag(
        "what to trace: all of a rollout's training, its optimizer steps, its log-probs (default: train_overall)",
        ["train_overall"],
    )
    profile_step_start: int = flag(
        "first rollout to trace, counted from the start of the trainer (default: 10)",
        10,
        metavar="N",
        owner="Megatron",
    )
    profile_step_end: int = flag(
        "the rollout before which tracing ends (default: 12)", 12, metavar="N", owner="Megatron"
    )
    profile_ranks: list[int] | None = flag(
        "trainer ranks that write traces and memory histories (default: all)",
        metavar="RANK",
        owner="Megatron",
    )
    record_memory_history: bool = flag(
        "record every allocation from the start, and write it when memory runs out, or at the end", False
    )
    memory_recorder: Literal["torch", "memray"] = flag(
        "torch: of the GPU; memray: of host memory (default: torch)", "torch"
    )
    memory_snapshot_dir: str | None = flag("default: profile/ of the run", metavar="DIR")
    memory_snapshot_num_steps: int | None = flag(
        "number of rollouts after which it is written and recording stops", metavar="N", at_least=1
    )


def idle_profiling(profiling: Profiling) -> list[str]:
    """A line for every flag that says how to profile while nothing is profiled."""
    switches = {
        "use_pytorch_profiler": ("profile_target", "profile_step_start", "profile_step_end"),
        "record_memory_history": ("memory_recorder", "memory_snapshot_dir", "memory_snapshot_num_steps"),
    }
    usual = Profiling()
    return [
        f"--{name.replace('_', '-')} changes nothing without --{switch.replace('_', '-')}"
        for switch, names in switches.items()
        for name in names
        if not getattr(profiling, switch) and getattr(profiling, name) != getattr(usual, name)
    ]


@dataclass(frozen=True)
class Debug:
    """Debug."""

    debug_train_only: bool = flag("no engines: the rollout function makes the data itself", False)
    debug_rollout_only: bool = flag(
        "no trainer: generate and grade with the weights of --hf-checkpoint", False
    )
    save_debug_rollout_data: str | None = flag(
        "also write every rollout to this Parquet file; {rollout_id} stands for the rollout's number",
        metavar="FILE",
    )
    save_debug_train_data: str | None = flag(
        "write the data that each rank trained on, with all inputs of the loss; needs {rollout_id} and {rank}",
        metavar="FILE",
    )
    dump_details: str | None = flag(
        "--save-debug-rollout-data and --save-debug-train-data, both in this directory", metavar="DIR"
    )
    load_debug_rollout_data: str | None = flag(
        "no engines: train on recorded rollouts, from files with this name", metavar="FILE"
    )
    load_debug_rollout_data_subsample: float | None = flag(
        "train on this share of the recorded groups", metavar="F"
    )


def resolve_debug(debug: Debug, functions: Functions) -> tuple[Debug, Functions]:
    """Recorded rollouts stand in for engines and prompts; names of files become absolute.

    Raises:
        UserError: names the flags that contradict each other, or a file name that can't be one.
    """
    debug = _with_details(debug)
    if debug.save_debug_rollout_data is not None:
        path = _parquet(debug.save_debug_rollout_data)
        _check_template("--save-debug-rollout-data", path)
        debug = replace(debug, save_debug_rollout_data=absolute(path))
    if debug.load_debug_rollout_data is not None:
        path = _parquet(debug.load_debug_rollout_data)
        _check_template("--load-debug-rollout-data", path)
        debug = replace(debug, load_debug_rollout_data=absolute(path))
    if debug.save_debug_train_data is not None:
        _check_train_template(debug.save_debug_train_data)
        debug = replace(debug, save_debug_train_data=absolute(debug.save_debug_train_data))
    if debug.load_debug_rollout_data:
        debug = replace(debug, debug_train_only=True)
        functions = replace(
            functions,
            rollout_function_path=f"{_RECORDED}.generate_rollout",
            data_source_path=f"{_RECORDED}.NoPrompts",
        )
    share = debug.load_debug_rollout_data_subsample
    if share is not None and not (debug.load_debug_rollout_data and 0 < share <= 1):
        raise UserError(
            f"--load-debug-rollout-data-subsample {share:g}: the share must be greater than 0 and at most 1,"
            " and it needs --load-debug-rollout-data."
        )
    if debug.debug_rollout_only and debug.debug_train_only:
        raise UserError(
            "--debug-rollout-only runs without a trainer, and --debug-train-only or --load-debug-rollout-data without"
            " engines: leave one of them out."
        )
    return debug, functions


def check_profiling(profiling: Profiling, debug: Debug) -> None:
    """Refuse a profile that can't be made.

    Raises:
        UserError: names the flags.
    """
    start, end = profiling.profile_step_start, profiling.profile_step_end
    if profiling.use_pytorch_profiler and not 0 <= start < end:
        raise UserError(
            f"--profile-step-start {start} and --profile-step-end {end}: no rollout is in that range."
        )
    flag = "--use-pytorch-profiler" if profiling.use_pytorch_profiler else "--record-memory-history"
    if debug.debug_rollout_only and (profiling.use_pytorch_profiler or profiling.record_memory_history):
        raise UserError(f"{flag} needs a trainer, and --debug-rollout-only has none. Leave one of them out.")


def _with_details(debug: Debug) -> Debug:
    """What --dump-details writes, in slime's layout; a file that has a flag of its own goes where that says."""
    if debug.dump_details is None:
        return debug
    directory = absolute(debug.dump_details).replace("{", "{{").replace("}", "}}")
    return replace(
        debug,
        save_debug_rollout_data=debug.save_debug_rollout_data
        or f"{directory}/rollout_data/{{rollout_id}}.parquet",
        save_debug_train_data=debug.save_debug_train_data
        or f"{directory}/train_data/{{rollout_id}}_{{rank}}.parquet",
    )


def check_recorded(debug: Debug, num_rollout: int | None) -> None:
    """Check that every rollout of the run has been recorded.

    Raises:
        UserError: names the first file that is missing; or there is no number of rollouts.
    """
    if num_rollout is None:
        raise UserError(
            "--load-debug-rollout-data: recorded rollouts have no epochs. Give --num-rollout, not --num-epoch."
        )
    template = debug.load_debug_rollout_data or ""
    for rollout_id in range(num_rollout):
        path = Path(template.format(rollout_id=rollout_id))
        if not path.is_file():
            theirs = path.with_suffix(".pt")
            raise UserError(
                f"--load-debug-rollout-data: there is no {path}, for rollout {rollout_id} of --num-rollout"
                f" {num_rollout}."
                + (
                    f" {theirs} holds objects of slime, which only slime can read."
                    if theirs.is_file()
                    else ""
                )
            )


def _parquet(template: str) -> str:
    """slime's scripts name torch files; the same rollouts are in Parquet files here."""
    return f"{template.removesuffix('.pt')}.parquet" if template.endswith(".pt") else template


def _check_train_template(template: str) -> None:
    try:
        names = {template.format(rollout_id=i, rank=j) for i in (0, 1) for j in (0, 1)}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"--save-debug-train-data {template}: only {{rollout_id}} and {{rank}} may stand in braces ({error})."
        ) from None
    if len(names) < 4 or not template.endswith(".parquet"):
        raise UserError(
            f"--save-debug-train-data {template}: the name must have {{rollout_id}} and {{rank}} in it, or one file"
            " would replace another, and end in .parquet."
        )


def _check_template(flag: str, template: str) -> None:
    try:
        names = {template.format(rollout_id=number) for number in (0, 1)}
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{flag} {template}: only {{rollout_id}} may stand in braces, as in {{rollout_id:06d}} ({error})."
        ) from None
    if not template.endswith(".parquet"):
        raise UserError(
            f"{flag} {template}: rollouts are Parquet files here, not torch's. End the name in .parquet; pandas reads"
            " it, one row per sample."
        )
    if flag.startswith("--save") and len(names) == 1:
        raise UserError(
            f"{flag} {template}: without {{rollout_id}} in it every rollout would replace the last."
        )
