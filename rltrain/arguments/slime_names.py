"""Names in slime's launch scripts: functions that are elsewhere here, flags that do nothing, flags that are refused."""

from __future__ import annotations

import argparse
from typing import Any

from rltrain.arguments.config import Config
from rltrain.arguments.engine_names import RENAMED
from rltrain.arguments.groups.debug import idle_profiling
from rltrain.run.errors import UserError

_OF_SLIMES_CI = (
    "it is for slime's own tests. The trainer's log-probs are compared with the engines' in every step, and the"
    " norm of every gradient is in metrics.jsonl; leave it out"
)
_OF_SLIMES_BUFFER = (
    "it belongs to slime's rollout buffer server. Programs that make rollouts are --agent-command or"
    " --agent-function-path here, and a rollout function of your own may ask any server"
)
_OF_DISK_UPDATES = (
    "weights that go through files lie in the run directory, in --runs-dir, which all nodes must see. The newest"
    " two versions stay; leave it out"
)
# Refused for good, why, and what to do instead.
REFUSED = {
    "use-stateless-adam": "megatron-core has no Adam without averages. --optimizer sgd keeps none, and"
    " --optimizer-cpu-offload keeps Adam's in host memory",
    "use-checkpoint-opt-param-scheduler": "a resumed run keeps its own flags, schedule included, and a flag"
    " that is given again takes effect; leave it out",
    "allgather-cp": "--cp-comm-type sets what context parallelism exchanges",
    "http-proxy": "requests to router and engines never go through a proxy. For those that your own functions"
    " send, export https_proxy before hpc.submit",
    "multimodal-keys": "models here take neither images nor sound",
    "release-train": "trainer ranks run from the first step to the last. --offload-train gives the engines"
    " their GPU memory while they generate",
    "train-env-vars": "all processes of the job inherit the environment of hpc.submit: export the variables before it",
    "custom-update-weight-post-write-path": "only nodes that see the run directory read files of weights."
    " --update-weight-transport distributed needs no files",
    "update-weight-disk-dir": _OF_DISK_UPDATES,
    "update-weight-disk-keep-files": _OF_DISK_UPDATES,
} | {
    name: why
    for why, names in {
        _OF_SLIMES_CI: "ci-test ci-disable-kl-checker ci-train-rollout-logprob-abs-diff-threshold ci-save-grad-norm"
        " ci-load-grad-norm",
        _OF_SLIMES_BUFFER: "rollout-buffer-url rollout-task-type fetch-trajectory-retry-times"
        " min-batch-collection-ratio",
    }.items()
    for name in names.split()
}

# Functions that come with slime, and where the same is here.
_OURS = {
    "slime.rollout.sglang_rollout.generate_rollout": "rltrain.rollout.sglang_rollout.generate_rollout",
    "slime.rollout.sglang_rollout.generate": "rltrain.rollout.sglang_rollout.generate",
    "slime.rollout.sft_rollout.generate_rollout": "rltrain.rollout.sft_rollout.generate_rollout",
    "slime.rollout.data_source.RolloutDataSource": "rltrain.data.source.RolloutDataSource",
    "slime.rollout.data_source.RolloutDataSourceWithBuffer": "rltrain.data.source.RolloutDataSource",
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": (
        "rltrain.rollout.filters.check_reward_nonzero_std"
    ),
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback": (
        "rltrain.rollout.filters.check_reward_nonzero_std_with_fallback"
    ),
    "slime.rollout.on_policy_distillation.reward_func": "rltrain.rewards.distillation.reward_func",
    "slime.rollout.on_policy_distillation.post_process_rewards": "rltrain.rewards.distillation.post_process_rewards",
    "slime.backends.megatron_utils.loss.vanilla_tis_function": "rltrain.algorithms.mismatch.tis",
    "slime.backends.megatron_utils.loss.icepop_function": "rltrain.algorithms.mismatch.icepop",
} | {
    f"examples.{folder}train_infer_mismatch_helper.mis.compute_mis_weights{suffix}": "rltrain.algorithms.mismatch.mis"
    for folder in ("", "infra_features.")
    for suffix in ("", "_with_cp")
}  # fmt: skip
# Those that have no counterpart, and what to do; by the beginning of the path.
_INSTEAD = {
    "fully_async_rollout.": "--max-staleness K generates ahead of the trainer with the default rollout function",
    "examples.fully_async.": "--max-staleness K generates ahead of the trainer with the default rollout function",
    "slime.rollout.fully_async_rollout.": (
        "--max-staleness K generates ahead of the trainer with the default rollout function"
    ),
    "slime.rollout.rm_hub.": "--rm-type has these rewards; see docs/rewards.md",
    "slime.": "see docs/from_slime.md",
    "slime_plugins.": "see docs/from_slime.md",
}


def our_path(path: str, flag: str) -> str:
    """The import path here of a function that comes with slime; other paths stay.

    Raises:
        UserError: it comes with slime and has no counterpart here.
    """
    path = path.replace(":", ".") if path.startswith("slime.") else path
    for beginning, instead in _INSTEAD.items():
        if path not in _OURS and path.startswith(beginning):
            raise UserError(f"{flag} {path} comes with slime and has no counterpart here: {instead}.")
    return _OURS.get(path, path)


_ALWAYS_ON = "it is always on"
# Flag → why; a name that begins with `=` takes no value.
_WHY = {
    "seq-length": "sequences are packed at their own lengths",
    "max-position-embeddings": "rotary embeddings have no table; config.json sets the limit",
    "tokenizer-type": "the tokenizer is that of --hf-checkpoint",
    "tokenizer-model": "the tokenizer is that of --hf-checkpoint",
    "train-iters": "--num-rollout or --num-epoch sets the length of a run",
    "eval-iters": "evaluation sets are evaluated whole",
    "log-interval": "every step is logged",
    "num-workers": "prompts are read by the rollout process",
    "loss-mask-type": "the tokenizer's own chat template determines which turns are trained on",
    "train-backend": "there is one backend, Megatron",
    "rotary-scaling-factor": "only multi-latent attention has it; Llama 3's factor comes from config.json",
    "spec": "config.json's architecture sets the layers; --custom-model-provider-path builds others",
    "transformer-impl": "TransformerEngine is used if it and a GPU are present",
    "data-pad-size-multiplier": "packed sequences are padded only as far as parallelism needs",
    "update-weight-delta-encoding": "changes replace the old values, element by element",
    "update-weight-delta-checksum": "a sample of every tensor is always checked",
    "update-weight-local-checkpoint-dir": "engines keep the weights that a delta applies to in their TMPDIR",
    "=use-fault-tolerance": _ALWAYS_ON,
    "=balance-data": _ALWAYS_ON,
    "=use-distributed-post": "one process sends all requests; perf/loop_lag_p99 shows whether it keeps up",
    "=disable-wandb-random-suffix": "a run has its own name in W&B, without a suffix",
    "=wandb-always-use-train-step": "all metrics have one axis in W&B: step, the number of the rollout",
    "=use-mcore-models": "only megatron-core's models exist here",
    "=use-flash-attn": "--attention-backend chooses",
    "=no-create-attention-mask-in-dataloader": "attention masks are never made",
    "=log-throughput": "throughput is always logged",
    "=auto-detect-ckpt-format": "the format of a checkpoint is always detected",
    "=use-persistent-ckpt-worker": "--async-save uses one process per checkpoint",
    "=override-opt-param-scheduler": "the flags of the current start always apply",
    "=use-dist-ckpt": "--ckpt-format chooses",
    "=enable-experimental": "megatron-core asks for it itself",
    "=log-multi-turn": "every message and turn is in the rollout files",
    "=log-passrate": "pass rates are always logged",
    "=recompute-loss-function": "the loss stores no tensor as large as the logits, and recomputes them when needed",
}
IGNORED = {name.removeprefix("="): why for name, why in _WHY.items()}
EPOCHS = "num-epoch"  # ignored beside --num-rollout
_SWITCHES = {name[1:] for name in _WHY if name.startswith("=")}
_SEVERAL = {"spec"}


class _Ignore(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name = (option_string or "").removeprefix("--")
        namespace.ignored_flags = sorted({*getattr(namespace, "ignored_flags", []), name})


def add_ignored_flags(parser: argparse.ArgumentParser) -> None:
    """Add those that the parser does not have; `--help` does not show them."""
    for name in IGNORED:
        if f"--{name}" not in parser._option_string_actions:
            parser.add_argument(
                f"--{name}",
                action=_Ignore,
                nargs=0 if name in _SWITCHES else "+" if name in _SEVERAL else None,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def _renamed(name: str) -> str:
    now = RENAMED[name.removeprefix("sglang-")]
    value = f" {now.value}" if now.value else ""
    return f"--{name} is taken as --sglang-{now.name}{value}, its name in SGLang since {now.since}"


def _ignored(name: str) -> str:
    if name == EPOCHS:
        return f"--{EPOCHS} has no effect: --num-rollout sets the run's length"
    verb = "has no effect" if IGNORED[name] == _ALWAYS_ON else "is ignored"
    return f"--{name} {verb}: {IGNORED[name]}"


def remarks(config: Config) -> list[str]:
    """One line for every flag that was given and changes nothing, or less than it seems, or has another name now."""
    ignored = [
        _renamed(name) if name.startswith("sglang-") else _ignored(name) for name in config.ignored_flags
    ]
    if saved := config.debug.save_debug_rollout_data:
        ignored.append(
            f"--save-debug-rollout-data writes Parquet, one row per sample, not torch's format: {saved}"
        )
    ignored += idle_profiling(config.profiling)
    if (
        config.mtp.enable_mtp_training
        and config.engines.sglang.get("speculative_algorithm", "NGRAM") != "NGRAM"
    ):
        ignored.append(
            "--enable-mtp-training: engines draft with the weights that they started with, because a push does not"
            " update that layer; checkpoints and exports hold the trained layer"
        )
    return ignored
