"""Every function that a user can put in place of ours, by import path: its flag, its signature, what it is for.

The names and the signatures are slime's. What is checked here before anything starts is that the function
exists and takes what it will be called with; docs/extending.md shows each.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rltrain.arguments.slime_defaults import DEFAULT_DATA_SOURCE, DEFAULT_ROLLOUT_FUNCTION


@dataclass(frozen=True)
class Extension:
    """One flag that names a function, and how that function is called."""

    flag: str
    positional: tuple[str, ...]
    help: str
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # given by name to functions that have such a parameter
    coroutine: bool | None = False  # whether it is an `async def`, which is awaited; None: as it likes
    default: str | None = None
    several: bool = False  # may be given more than once
    older: str | None = None  # another spelling of the flag
    added_here: bool = True  # False: the parser has it from another group of flags

    @property
    def dest(self) -> str:
        """The attribute of the namespace."""
        return self.flag.removeprefix("--").replace("-", "_")


_LOSS = (
    "args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths", "response_lengths",
)  # fmt: skip

EXTENSIONS = (
    Extension("--rollout-function-path", ("args", "rollout_id", "data_source"), "makes a batch, or an evaluation",
              keywords=("evaluation",), coroutine=None, default=DEFAULT_ROLLOUT_FUNCTION),
    Extension("--eval-function-path", ("args", "rollout_id", "data_source"),
              "makes an evaluation (default: the rollout function)", keywords=("evaluation",), coroutine=None),
    Extension("--custom-generate-function-path", ("args", "sample", "sampling_params"), "fills one sample",
              optional=("evaluation",), coroutine=True),
    Extension("--custom-rm-path", ("args", "sample"), "returns the reward (with --group-rm: of a list of samples)",
              coroutine=None),
    Extension("--dynamic-sampling-filter-path", ("args", "samples"), "says whether a graded group is kept"),
    Extension("--buffer-filter-path", ("args", "rollout_id", "buffer", "num_samples"),
              "takes groups out of those that were given back"),
    Extension("--rollout-sample-filter-path", ("args", "groups"), "sets remove_sample of samples not to train on"),
    Extension("--rollout-sample-hook-path", ("args", "sample"), "sees each sample before its reward; repeatable",
              optional=("rollout_id", "evaluation"), coroutine=None, several=True),
    Extension("--rollout-all-samples-process-path", ("args", "samples", "data_source"),
              "sees all groups, also those filtered out"),
    Extension("--rollout-data-postprocess-path", ("args", "samples"), "changes the finished groups"),
    Extension("--custom-reward-post-process-path", ("args", "samples"),
              "returns the rewards as graded and as trained on"),
    Extension("--custom-convert-samples-to-train-data-path", ("args", "samples"),
              "returns what is trained on, as a dict"),
    Extension("--custom-rollout-log-function-path",
              ("rollout_id", "args", "samples", "rollout_extra_metrics", "rollout_time"),
              "makes the metrics of a batch; returns True to leave ours out"),
    Extension("--custom-eval-rollout-log-function-path", ("rollout_id", "args", "data", "extra_metrics"),
              "the same for evaluations"),
    Extension("--data-source-path", ("args",), "class that hands out prompts", default=DEFAULT_DATA_SOURCE),
    Extension("--custom-megatron-init-path", ("args",), "called before the model is built"),
    Extension("--custom-megatron-before-log-prob-hook-path", ("args", "model", "store_prefix"),
              "called before log-probs are computed, for which prefix: '', ref_ or teacher_",
              older="--custom-megatron-before-log-prob-hook"),
    Extension("--custom-megatron-before-train-step-hook-path",
              ("args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler"),
              "called before every optimizer step", older="--custom-megatron-before-train-step-hook"),
    Extension("--custom-model-provider-path", (), "builds this rank's part of the model",
              keywords=("pre_process", "post_process"), optional=("vp_stage", "config", "args")),
    Extension("--custom-loss-function-path", ("args", "batch", "logits", "sum_of_sample_mean"), "", added_here=False),
    Extension("--custom-advantage-function-path", ("args", "rollout_data"), "", added_here=False),
    Extension("--custom-tis-function-path", (), "", keywords=_LOSS, added_here=False),
    Extension("--custom-pg-loss-reducer-function-path",
              ("total_lengths", "response_lengths", "loss_masks", "calculate_per_token_loss"), "", added_here=False),
)  # fmt: skip


def add_extension_flags(group: argparse._ArgumentGroup) -> None:
    """Add those that no other group has."""
    for each in EXTENSIONS:
        if not each.added_here:
            continue
        if each.several:
            group.add_argument(each.flag, action="append", default=[], metavar="PATH", help=each.help)
        else:
            spellings = [each.flag] + ([each.older] if each.older else [])
            group.add_argument(*spellings, default=each.default, metavar="PATH", help=each.help)
    group.add_argument("--group-rm", action="store_true", help="grade the samples of a prompt together")
    group.add_argument(
        "--custom-config-path", metavar="FILE", help="TOML, JSON or YAML: further attributes of args"
    )


def check_extensions(args: argparse.Namespace) -> None:
    """See that every function that the flags name exists and can be called as it will be.

    Raises:
        UserError: names the flag and the function, and how it is called.
    """
    from rltrain.functions import check_function

    for each in EXTENSIONS:
        given = getattr(args, each.dest)
        for path in given if isinstance(given, list) else [given]:
            if path:
                check_function(
                    path, flag=each.flag, positional=each.positional, keywords=each.keywords,
                    optional=each.optional, coroutine=each.coroutine,
                )  # fmt: skip
