"""slime's flags: same names, same meaning, so that a slime launch script's arguments work here.

What slime knows and this version does not is listed in `NOT_YET`, and refused by name.
"""

from __future__ import annotations

import argparse
import json

from rltrain.arguments.algorithm_flags import add_algorithm_flags
from rltrain.arguments.checkpoint_flags import add_checkpoint_flags
from rltrain.arguments.critic_flags import add_critic_flags
from rltrain.arguments.debug_flags import add_debug_flags
from rltrain.arguments.extensions import add_extension_flags

# Known to slime, not built here yet: better refused than silently ignored.
NOT_YET = frozenset(
    """
    allgather-cp ci-disable-kl-checker ci-load-grad-norm
    ci-save-grad-norm ci-test ci-train-rollout-logprob-abs-diff-threshold
    custom-update-weight-post-write-path data-pad-size-multiplier
    disable-rollout-global-dataset disable-wandb-random-suffix dump-details
    fetch-trajectory-retry-times http-proxy
    log-correct-samples log-probs-chunk-size
    log-reward-category memory-recorder memory-snapshot-dir memory-snapshot-num-steps
    min-batch-collection-ratio multimodal-keys profile-target
    recompute-loss-function record-memory-history release-train rollout-buffer-url
    rollout-task-type tb-experiment-name tb-project-name train-env-vars
    update-weight-disk-dir update-weight-disk-keep-files
    use-distributed-post use-rollout-entropy use-rollout-routing-replay
    use-routing-replay use-stateless-adam use-tensorboard wandb-always-use-train-step wandb-host
    """.split()  # noqa: SIM905 (a hundred quoted strings read worse)
)


def add_slime_flags(parser: argparse.ArgumentParser) -> None:
    """Add the supported ones, grouped as slime's documentation groups them."""
    parser.set_defaults(sglang_models=[])
    _cluster(parser.add_argument_group("cluster"))
    _rollout(parser.add_argument_group("rollout"))
    add_extension_flags(parser.add_argument_group("functions of your own"))
    _data(parser.add_argument_group("data"))
    _eval(parser.add_argument_group("evaluation"))
    add_algorithm_flags(parser.add_argument_group("algorithm"))
    add_critic_flags(parser.add_argument_group("critic"))
    _training(parser.add_argument_group("training"))
    add_checkpoint_flags(parser.add_argument_group("model and checkpoints"))
    _tracking(parser.add_argument_group("tracking"))
    add_debug_flags(parser.add_argument_group("debug"))


def _cluster(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--actor-num-nodes", type=int, default=1, metavar="N", help="trainer nodes (default: 1)")
    add("--actor-num-gpus-per-node", type=int, default=1, metavar="N",
        help="trainer ranks on a node: one a GPU, or one a process on a CPU (default: 1)")  # fmt: skip
    add("--rollout-num-gpus", type=int, metavar="N",
        help="GPUs (CPU: processes) for all engines together (default: one engine)")  # fmt: skip
    add("--rollout-num-gpus-per-engine", type=int, default=1, metavar="N",
        help="tensor parallel size of an engine (default: 1)")  # fmt: skip
    add("--num-gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    add("--colocate", action="store_true", help="engines and trainer share the same GPUs")
    for flag, who in (("--offload-train", "trainer"), ("--offload-rollout", "engines")):
        add(flag, action=argparse.BooleanOptionalAction, default=None,
            help=f"{who}: give GPU memory up while the others work (default: with --colocate)")  # fmt: skip
    add("--offload", action="store_true", help="both of these")
    add("--distributed-backend", choices=["nccl", "gloo"], help="default: nccl with CUDA, else gloo")
    add(
        "--distributed-timeout-minutes",
        type=int,
        default=10,
        metavar="MIN",
        help="of a collective (default: 10)",
    )


def _rollout(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rm-type", metavar="NAME", help="built-in reward; see docs/rewards.md")
    add("--rm-url", metavar="URL", help="server of --rm-type remote_rm")
    add("--reward-key", metavar="KEY", help="entry of a dict reward that is trained on")
    add("--eval-reward-key", metavar="KEY", help="the same for evaluation (default: --reward-key)")
    add(
        "--reward-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="a reward slower than this fails its sample",
    )
    add("--reward-num-workers", type=int, default=1, metavar="N", help="reward processes (default: 1)")
    add("--rollout-temperature", type=float, default=1.0, metavar="T", help="default: 1.0")
    add("--rollout-top-p", type=float, default=1.0, metavar="P", help="default: 1.0")
    add("--rollout-top-k", type=int, default=-1, metavar="K", help="-1: off (default)")
    add("--rollout-max-context-len", type=int, metavar="N", help="prompt and response together, in tokens")
    add("--rollout-max-prompt-len", type=int, metavar="N", help="longer prompts are left out and counted")
    add("--rollout-max-response-len", type=int, default=1024, metavar="N", help="in tokens (default: 1024)")
    add("--rollout-stop", nargs="+", metavar="TEXT", help="stop words")
    add("--rollout-stop-token-ids", nargs="+", type=int, metavar="ID", help="stop tokens")
    add(
        "--rollout-skip-special-tokens",
        action="store_true",
        help="leave special tokens out of the response text",
    )
    add("--over-sampling-batch-size", type=int, metavar="N",
        help="prompts sampled at a time where a filter drops some (default: --rollout-batch-size)")  # fmt: skip
    add("--partial-rollout", action="store_true",
        help="go on later with responses that are stopped because the batch is full")  # fmt: skip
    add("--mask-offpolicy-in-partial-rollout", action="store_true", help="do not train on those tokens")
    add("--max-failed-fraction", type=float, default=0.5, metavar="F",
        help="share of failed samples in a batch that stops the run (default: 0.5)")  # fmt: skip
    add("--rollout-shuffle", action="store_true", help="shuffle the prompts in every epoch")
    add(
        "--rollout-seed", type=int, default=42, metavar="SEED", help="of shuffling and sampling (default: 42)"
    )
    add(
        "--sglang-server-concurrency", type=int, default=512, metavar="N", help="requests in flight an engine"
    )
    _engines(group)
    _health(group)
    _weights(group)


def _engines(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--sglang-config",
        metavar="FILE",
        help="models, each with its router and groups of engines; docs/engines.md",
    )
    add("--rollout-external-engine-addrs", nargs="+", metavar="HOST:PORT",
        help="engines that the job does not start, but uses and gives weights")  # fmt: skip
    add("--rollout-external-engines-file", metavar="FILE",
        help="the same, one a line; read again when it changes")  # fmt: skip
    add("--sglang-router-ip", metavar="HOST", help="a router that the job does not start")
    add("--sglang-router-port", type=int, metavar="PORT", help="and its port")
    add("--rollout-router", choices=["sglang-router", "smg"], default="sglang-router",
        help="the router to start: sglang-router, or its successor where that is installed")  # fmt: skip


def _health(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-fault-tolerance", action="store_true", help="for slime's sake: it is always so here")
    add("--rollout-health-check-interval", type=float, default=30.0, metavar="S",
        help="between two looks whether an engine makes progress (default: 30)")  # fmt: skip
    add("--rollout-health-check-timeout", type=float, default=30.0, metavar="S",
        help="without progress until an engine is ended, ten times that for weights (default: 30)")  # fmt: skip
    add("--rollout-health-check-first-wait", type=float, default=0.0, metavar="S",
        help="from an engine's start to the first look, for what it compiles (default: 0)")  # fmt: skip


def _weights(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-staleness", type=int, default=0, metavar="K",
        help="versions by which a sample may be behind: rollouts run that far ahead (default: 0)")  # fmt: skip
    add("--update-weight-transport", default="auto",
        choices=["auto", "disk", "tensor", "distributed", "nccl"],
        help="how weights reach the engines: files, shared memory, process groups (default: by layout)")  # fmt: skip
    add("--update-weight-mode", choices=["full", "delta"], default="full",
        help="delta: send only what has changed since the last push (default: full)")  # fmt: skip
    add("--update-weight-buffer-size", type=int, default=512 * 1024**2, metavar="BYTES",
        help="of weights under way at a time, at most (default: 512 MiB); 64 MiB by shared memory or gloo")  # fmt: skip
    add("--check-weight-update-equal", action="store_true",
        help="see once that a push restores every tensor of engines that were given random ones")  # fmt: skip
    add("--update-weights-interval", type=int, default=1, metavar="N",
        help="rollouts between two pushes (default: 1)")  # fmt: skip


def _data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt-data", metavar="FILE", help="JSONL or Parquet prompts; FILE@[a:b] takes a slice")
    add("--prompt-data-mix", nargs="+", metavar="FILE WEIGHT",
        help="instead: pairs of a file and how often its prompts come in an epoch (0.5: half of them)")  # fmt: skip
    add(
        "--input-key", default="input", metavar="KEY", help="of the prompt: text or messages (default: input)"
    )
    add("--label-key", metavar="KEY", help="of the answer that the reward compares with")
    add("--metadata-key", default="metadata", metavar="KEY", help="of further fields (default: metadata)")
    add("--tool-key", default="tools", metavar="KEY", help="of the chat template's tools (default: tools)")
    add("--apply-chat-template", action="store_true", help="render messages with the tokenizer's template")
    add("--apply-chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help="for the template")
    add("--num-rollout", type=int, metavar="N", help="rollouts (steps of the loop) in the whole run")
    add("--num-epoch", type=int, metavar="N", help="instead of --num-rollout: passes over the prompts")
    add("--start-rollout-id", type=int, metavar="N", help="default: after the checkpoint that is loaded")
    add("--rollout-batch-size", type=int, metavar="N", help="prompts in a rollout")
    add("--n-samples-per-prompt", type=int, default=1, metavar="N", help="responses to each (default: 1)")
    add("--global-batch-size", type=int, metavar="N", help="samples in an optimizer step")
    add("--num-steps-per-rollout", type=int, metavar="N", help="optimizer steps in a rollout")
    add("--micro-batch-size", type=int, default=1, metavar="N", help="samples in a micro-batch (default: 1)")
    add(
        "--use-dynamic-batch-size",
        action="store_true",
        help="pack samples up to --max-tokens-per-gpu instead",
    )
    add("--max-tokens-per-gpu", type=int, metavar="N", help="tokens in a packed micro-batch")
    add("--log-probs-max-tokens-per-gpu", type=int, metavar="N", help="the same where no gradient is needed")
    add(
        "--balance-data", action="store_true", help="always on: data parallel ranks get even shares of tokens"
    )
    add(
        "--balance-by-flops",
        action="store_true",
        help="even shares of arithmetic instead: long samples cost more",
    )


def _eval(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-interval", type=int, metavar="N", help="rollouts between two evaluations")
    add(
        "--eval-prompt-data",
        nargs="+",
        metavar="NAME FILE",
        help="one or more pairs of a name and a prompt file",
    )
    add("--eval-config", metavar="FILE", help="further sets, each with sampling and reward of its own")
    add("--skip-eval-before-train", action="store_true", help="do not evaluate the untrained model")
    add("--eval-input-key", metavar="KEY", help="default: --input-key")
    add("--eval-label-key", metavar="KEY", help="default: --label-key")
    add("--eval-tool-key", metavar="KEY", help="default: --tool-key")
    add("--n-samples-per-eval-prompt", type=int, default=1, metavar="N", help="default: 1")
    add("--eval-temperature", type=float, metavar="T", help="default: --rollout-temperature")
    add("--eval-top-p", type=float, metavar="P", help="default: --rollout-top-p")
    add("--eval-top-k", type=int, metavar="K", help="default: --rollout-top-k")
    add("--eval-max-response-len", type=int, metavar="N", help="default: --rollout-max-response-len")
    add("--eval-max-prompt-len", type=int, metavar="N", help="default: --rollout-max-prompt-len")
    add("--eval-max-context-len", type=int, metavar="N", help="default: --rollout-max-context-len")
    add("--eval-min-new-tokens", type=int, metavar="N", help="no response ends before (default: 0)")


def _training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--only-train-params-name-list",
        nargs="*",
        metavar="REGEX",
        help="train only parameters that match one",
    )
    add("--freeze-params-name-list", nargs="*", metavar="REGEX", help="train no parameter that matches one")
    add("--reset-optimizer-states", action="store_true", help="forget Adam's averages before every rollout")
    add("--max-skipped-steps", type=int, default=10, metavar="N",
        help="optimizer steps in a row whose loss or gradient is no finite number, after which the run stops"
        " (default: 10)")  # fmt: skip
    add("--no-save-trainer-tokens", action="store_false", dest="save_trainer_tokens",
        help="do not write the trainer's log-probs, entropies and advantages of every token")  # fmt: skip


def _tracking(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-wandb", action="store_true", help="log to Weights & Biases beside metrics.jsonl")
    add("--wandb-mode", choices=["online", "offline", "disabled"], help="default: WANDB_MODE, else offline")
    add("--wandb-dir", metavar="DIR", help="default: the run directory")
    add("--wandb-team", metavar="NAME", help="W&B entity")
    add("--wandb-project", metavar="NAME", default="slurmlime", help="default: slurmlime")
    add("--wandb-group", metavar="NAME", help="default: none")
    add("--wandb-key", metavar="KEY",
        help="better: the variable WANDB_API_KEY, as command lines can be read by others; stored nowhere")  # fmt: skip
    add("--wandb-run-id", metavar="ID", help="default: made once, kept for every attempt")
