"""Megatron flags that are handed on to megatron-core's configuration as they are.

Which flags megatron-core's dataclasses make is read from `megatron_flags.txt` (see `megatron_snapshot.py`), so that
this needs no megatron-core. Those in `HANDED_ON` take effect through the dataclass alone; every other one is refused
by name, because it would need something beside it that this trainer does not have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
        moe_router_dtype moe_router_force_load_balancing moe_router_fusion moe_token_drop_policy
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
class ConfigFlag:
    """A flag of the snapshot: what it sets, and the kind of its value (see `megatron_snapshot.describe`)."""

    name: str
    field: str
    config: str
    kind: str
    choices: tuple[str, ...]


@cache
def snapshot() -> tuple[ConfigFlag, ...]:
    """Every flag that megatron-core's dataclasses make."""
    flags = []
    for line in SNAPSHOT.read_text().splitlines()[1:]:
        name, field, config, kind, *choices = line.split()
        flags.append(ConfigFlag(name, field, config, kind, tuple(choices)))
    return tuple(flags)


def snapshot_version() -> str:
    """Which megatron-core the snapshot is of."""
    return SNAPSHOT.read_text().splitlines()[0].removeprefix("# ")


def refused_flags() -> frozenset[str]:
    """Flags of megatron-core, without dashes, that are known and refused."""
    refused = {flag.name for flag in snapshot() if flag.field not in HANDED_ON[flag.config]}
    return frozenset(refused - {flag.name for flag in snapshot() if flag.field in HANDED_ON[flag.config]})


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


def add_config_flags(parser: argparse.ArgumentParser, more: Iterable[ConfigFlag] = ()) -> None:
    """Add those of `HANDED_ON`, and `more`, that the parser does not have; they are not in `--help` one by one."""
    group = parser.add_argument_group(
        "megatron: configuration",
        "Further flags of Megatron that megatron-core's TransformerConfig, OptimizerConfig and"
        " DistributedDataParallelConfig take as they are: docs/arguments.md.",
    )
    parser.set_defaults(megatron={})
    taken = parser._option_string_actions  # grows with every flag that is added
    for flag in (*_own_flags(), *snapshot(), *more):
        if flag.field in HANDED_ON[flag.config] | _OWN_FIELDS and f"--{flag.name}" not in taken:
            _add(group, flag)


def _own_flags() -> list[ConfigFlag]:
    switches = [
        ConfigFlag(name, field, config, "on" if value else "off", ())
        for name, (config, field, value) in _SWITCHES.items()
    ]
    switches.append(
        ConfigFlag(
            "cp-comm-type", "cp_comm_type", "transformer", "choice", ("p2p", "all_gather", "a2a", "a2a+p2p")
        )
    )
    choices = ("fp32", "bf16", "fp16", "fp8")
    return switches + [
        ConfigFlag(name, field, "optimizer", "choice", choices) for name, field in _DTYPES.items()
    ]


def _add(group: argparse._ArgumentGroup, flag: ConfigFlag) -> None:
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


def given(args: argparse.Namespace, config: str) -> dict[str, Any]:
    """What the flags set in a configuration class: `transformer`, `optimizer` or `ddp`."""
    return dict((getattr(args, "megatron", None) or {}).get(config, {}))
