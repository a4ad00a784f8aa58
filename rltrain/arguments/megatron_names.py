"""Megatron's flags: which are handed on to megatron-core's configuration as they are, and which are refused by name.

`megatron_flags.txt` has the flags of every release that fits (`rltrain/tools/snapshot_megatron_flags.py` writes it), so
that this needs neither megatron-core nor a driver of a GPU. Those that fill a field of `HANDED_ON` take effect through
the dataclass alone; every other one is refused by name, because it would need something beside it that this trainer
does not have.

A checkout of Megatron-LM on PYTHONPATH may have flags of its own: they are read from its `megatron.training.arguments`.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rltrain.arguments.groups.model import Model

SNAPSHOT = Path(__file__).with_name("megatron_flags.txt")

# Fields by the dataclass that has them.
HANDED_ON: dict[str, frozenset[str]] = {
    "transformer": frozenset(
        """
        apply_query_key_layer_scaling attention_backend cp_comm_type deterministic_mode
        disable_bf16_reduced_precision_matmul distribute_saved_activations fp32_residual_connection
        init_method_std memory_efficient_layer_norm moe_apply_probs_on_input moe_deepep_num_sms moe_enable_deepep
        moe_expert_capacity_factor moe_flex_dispatcher_backend moe_grouped_gemm moe_hybridep_num_sms
        moe_input_jitter_eps moe_layer_recompute moe_pad_expert_input_to_capacity moe_permute_fusion
        moe_router_bias_update_rate moe_router_dtype moe_router_force_load_balancing moe_router_fusion
        moe_token_drop_policy
        moe_token_dispatcher_type moe_z_loss_coeff pipeline_model_parallel_comm_backend recompute_modules
        use_te_activation_func
        """.split()  # noqa: SIM905
    ),
    "optimizer": frozenset(
        """
        adam_beta1 adam_beta2 adam_eps apply_wd_to_qk_layernorm log_num_zeros_in_grad optimizer_cpu_offload
        optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params sgd_momentum
        store_param_remainders use_precision_aware_optimizer use_torch_optimizer_for_cpu_offload
        """.split()  # noqa: SIM905
    ),
    "ddp": frozenset(
        """
        bucket_size check_for_large_grads gradient_reduce_div_fusion nccl_ub pad_buckets_for_high_nccl_busbw
        reduce_scatter_with_fp32_accumulation
        """.split()  # noqa: SIM905
    ),
}  # fmt: skip

# Switches that Megatron's own parser has, and whose field has another name: flag → class, field, value.
_SWITCHES: dict[str, tuple[str, str, bool]] = {
    "accumulate-allreduce-grads-in-fp32": ("ddp", "grad_reduce_in_fp32", True),
    "attention-softmax-in-fp32": ("transformer", "attention_softmax_in_fp32", True),
    "no-bias-dropout-fusion": ("transformer", "bias_dropout_fusion", False),
    "no-bias-swiglu-fusion": ("transformer", "bias_activation_fusion", False),
    "no-check-for-nan-in-loss-and-grad": ("ddp", "check_for_nan_in_grad", False),
    "no-gradient-accumulation-fusion": ("transformer", "gradient_accumulation_fusion", False),
    "no-masked-softmax-fusion": ("transformer", "masked_softmax_fusion", False),
    "no-persist-layer-norm": ("transformer", "persist_layer_norm", False),
    "no-rope-fusion": ("transformer", "apply_rope_fusion", False),
}
_DTYPES = {
    f"{name.replace('_', '-')}": name
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
}
_OWN_FIELDS = frozenset([*(field for _, field, _ in _SWITCHES.values()), *_DTYPES.values()])
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "ints": int, "float": float, "floats": float}


@dataclass(frozen=True)
class MegatronFlag:
    """A flag of Megatron: what it sets, and the kind of its value (see `snapshot_megatron_flags.describe`).

    Attributes:
        config: the class that has the field: transformer, optimizer or ddp, or `-` for none of them.
        versions: releases of megatron-core that have it so, such as `0.19`; the oldest first.
    """

    name: str
    field: str
    config: str
    kind: str
    choices: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    @property
    def is_handed_on(self) -> bool:
        """Whether it takes effect through the field alone."""
        return self.field in HANDED_ON.get(self.config, ())


@cache
def snapshot() -> tuple[MegatronFlag, ...]:
    """Every flag of every stored release; where they differ in one: the installed release's, then the newest."""
    flags = [_read_line(line) for line in SNAPSHOT.read_text().splitlines()[1:]]
    here = release_of(installed_version() or "")
    flags.sort(key=lambda flag: (here in flag.versions, flag.versions[-1]), reverse=True)
    return tuple(flags)


def _read_line(line: str) -> MegatronFlag:
    name, field, config, kind, versions, *choices = line.split()
    return MegatronFlag(name, field, config, kind, tuple(choices), tuple(versions.split(",")))


def snapshot_versions() -> list[str]:
    """The releases of megatron-core whose flags are stored, the oldest first."""
    return SNAPSHOT.read_text().partition("\n")[0].removeprefix("# megatron-core ").split()


@cache
def installed_version() -> str | None:
    """The version of megatron-core in this environment, from the name of its metadata; None if there is none."""
    names = (path.name for entry in sys.path for path in Path(entry or ".").glob("megatron_core-*.dist-info"))
    return next((name.removesuffix(".dist-info").split("-")[1] for name in names), None)


def release_of(version: str) -> str:
    """`0.19` of `0.19.2`: the flags of a release do not change in its patches."""
    return ".".join(version.split(".")[:2])


def flags_used() -> str:
    """Whose flags are known here, for people."""
    megatron = find_megatron_lm()
    if megatron and not megatron.problem:
        return f"Megatron {megatron.version} at {megatron.root}"
    stored, here = snapshot_versions(), installed_version()
    version = next((each for each in stored if here and release_of(each) == release_of(here)), stored[-1])
    text = f"megatron-core {version} (stored list)"
    return f"{text}; {megatron.root} is not used: {megatron.problem}" if megatron else text


def refusal(name: str) -> str | None:
    """The reason why a flag of Megatron, without dashes, is refused; None if Megatron has no such flag."""
    megatron = find_megatron_lm()
    if megatron and name in megatron.flags:
        owner = f"Megatron {megatron.version} ({megatron.root})"
    elif versions := {version for flag in snapshot() if flag.name == name for version in flag.versions}:
        stored = [release_of(version) for version in snapshot_versions()]
        lacking = [version for version in stored if version not in versions]
        owner = "Megatron" + (f" {', '.join(sorted(versions))}" if lacking else "")
    else:
        return None
    if name == "fp16":
        return "--fp16 is not supported: its gradients need a scale, which this trainer does not keep. Train in --bf16."
    return f"--{name} is a flag of {owner} that this trainer does not support; remove it."


class _Store(argparse.Action):
    """Store the value in the namespace's `megatron` dict, under class and field."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        config, _, field = self.dest.partition(".")
        given = {name: dict(fields) for name, fields in (getattr(namespace, "megatron", None) or {}).items()}
        given.setdefault(config, {})[field] = self.const if self.nargs == 0 else values
        namespace.megatron = given


def add_config_flags(parser: argparse.ArgumentParser, more: Iterable[MegatronFlag] = ()) -> None:
    """Add the flags of `HANDED_ON` and `more` that the parser lacks; they are not in `--help` one by one."""
    group = parser.add_argument_group(
        "megatron: configuration",
        "Further flags of Megatron that megatron-core's TransformerConfig, OptimizerConfig and"
        " DistributedDataParallelConfig take unchanged: docs/arguments.md.",
    )
    taken = parser._option_string_actions  # grows with every flag that is added
    for flag in (*_own_flags(), *snapshot(), *more):
        if (
            flag.is_handed_on or (flag.config != "-" and flag.field in _OWN_FIELDS)
        ) and f"--{flag.name}" not in taken:
            _add(group, flag)


def _own_flags() -> list[MegatronFlag]:
    switches = [
        MegatronFlag(name, field, config, "on" if value else "off", ())
        for name, (config, field, value) in _SWITCHES.items()
    ]
    switches.append(
        MegatronFlag(
            "cp-comm-type", "cp_comm_type", "transformer", "choice", ("p2p", "all_gather", "a2a", "a2a+p2p")
        )
    )
    choices = ("fp32", "bf16", "fp16", "fp8")
    return switches + [
        MegatronFlag(name, field, "optimizer", "choice", choices) for name, field in _DTYPES.items()
    ]


def _add(group: argparse._ArgumentGroup, flag: MegatronFlag) -> None:
    switch = flag.kind in ("on", "off")
    group.add_argument(
        f"--{flag.name}",
        action=_Store,
        dest=f"{flag.config}.{flag.field}",
        nargs=0 if switch else "+" if flag.kind in ("ints", "floats", "strs") else None,
        const=flag.kind == "on" if switch else None,
        type=_TYPES.get(flag.kind, str),
        choices=flag.choices or None,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def given(model: Model, config: str) -> dict[str, Any]:
    """What the flags set in a configuration class: `transformer`, `optimizer` or `ddp`."""
    return dict(model.megatron.get(config, {}))


_MODULE = Path("megatron/training/arguments.py")


@dataclass(frozen=True)
class MegatronLM:
    """A checkout of Megatron-LM: its version, where it lies, its flags (without dashes), or why they can't be read."""

    version: str
    root: Path
    flags: dict[str, argparse.Action]
    problem: str = ""


@cache
def find_megatron_lm() -> MegatronLM | None:
    """The Megatron-LM that `import megatron.training` takes, or None if that is the wheel, whose flags are stored.

    Imports it, and torch, only if there is one. What needs a GPU's driver is not imported.
    """
    root = next((Path(entry) for entry in sys.path if (Path(entry or ".") / _MODULE).is_file()), None)
    if root is None or any(root.glob("megatron_core-*.dist-info")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a page of kernels that are not there, on a login node
            version, flags = read_parser()
    except Exception as error:
        return MegatronLM("", root, {}, f"importing it fails with {type(error).__name__}: {error}")
    return MegatronLM(version, root, flags)


def read_parser() -> tuple[str, dict[str, argparse.Action]]:
    """The version of the Megatron that is imported, and the flags of its own `parse_args`, without dashes."""
    from rltrain.packages import hide_kernels_that_need_a_driver

    hide_kernels_that_need_a_driver()
    arguments: Any = importlib.import_module("megatron.training.arguments")
    core: Any = importlib.import_module("megatron.core")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    options = parser._option_string_actions.items()
    flags = {option.removeprefix("--"): action for option, action in options if option.startswith("--")}
    return core.__version__, flags


def handed_on(megatron: MegatronLM) -> list[MegatronFlag]:
    """Its flags that fill a field of `HANDED_ON`."""
    configs = {field: config for config, fields in HANDED_ON.items() for field in fields}
    return [
        as_flag(name, action, configs[action.dest])
        for name, action in megatron.flags.items()
        if action.dest in configs
    ]


def as_flag(name: str, action: argparse.Action, config: str) -> MegatronFlag:
    """A flag of Megatron's parser, whose value is a field of `config`."""
    choices = tuple(each.name if isinstance(each, enum.Enum) else str(each) for each in action.choices or ())
    return MegatronFlag(name, action.dest, config, _kind_of(action), choices)


def _kind_of(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "off" if action.const is False else "on"
    if action.choices is not None and action.nargs is None:
        return "choice"
    kind = {int: "int", float: "float"}.get(action.type, "str")  # type: ignore[call-overload]
    return f"{kind}s" if action.nargs in ("+", "*") else kind
