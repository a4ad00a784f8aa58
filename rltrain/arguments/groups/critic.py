"""PPO's critic: its flags, and the settings in which the critic differs from the policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.arguments.declare import flag, worked_out
from rltrain.arguments.groups.algorithm import Algorithm
from rltrain.arguments.groups.data import absolute
from rltrain.arguments.recipes import read_config_file
from rltrain.run.errors import UserError, nearest

ROLES = ("actor", "critic")

# Both run on the same ranks, and share the plan of a step.
_SHARED = (
    "actor_num_nodes", "actor_num_gpus_per_node", "num_gpus_per_node", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "sequence_parallel", "hf_checkpoint", "global_batch_size",
    "num_steps_per_rollout", "micro_batch_size", "max_tokens_per_gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Critic:
    """Critic."""

    critic_load: str | None = flag(
        "first weights of the critic: a model, or checkpoints of a critic (default: the policy's)",
        metavar="DIR",
    )
    critic_save: str | None = flag(
        "where the critic's checkpoints go (default: critic/ inside --save)", metavar="DIR"
    )
    critic_lr: float | None = flag("learning rate of the critic (default: --lr)", metavar="LR", at_least=0)
    critic_lr_warmup_iters: int = flag(
        "warm-up of the critic, in optimizer steps (default: 0)", 0, metavar="N"
    )
    num_critic_only_steps: int = flag(
        "number of first rollouts that train only the critic (default: 0)", 0, metavar="N"
    )
    value_clip: float = flag("how far a value may move in one rollout (default: 0.2)", 0.2, metavar="E")
    swap_critic: bool = flag(
        "keep the model that is not being used in host memory, where there is a GPU (default: yes)",
        True,
        owner="slurmlime",
    )
    megatron_config_path: str | None = flag(
        "YAML: other flags for the actor or the critic alone", metavar="FILE"
    )
    # The critic's part of --megatron-config-path, as JSON: TOML, in which the job stores its flags, has no null.
    critic_overrides: str | None = worked_out()


def use_critic(algorithm: Algorithm) -> bool:
    """True if the run trains a critic, as PPO does."""
    return algorithm.advantage_estimator == "ppo" and algorithm.loss_type != "sft_loss"


def read_overrides(
    path: str, values: Mapping[str, Any], converters: Mapping[str, Callable[[str], Any] | None]
) -> dict[str, dict[str, Any]]:
    """What `--megatron-config-path` sets for the actor and for the critic, by role and name.

    The file holds `megatron: [{role: critic, overrides: {lr: 1e-5}}]`, with attributes' names, as slime has it.

    Args:
        path: the file.
        values: the run's values by name.
        converters: by name, what makes a value of a text; None where a text is wanted.

    Raises:
        UserError: another structure, an unknown name, or an entry that both have to share.
    """
    where = f"--megatron-config-path {path}"
    roles = _read_roles(path, where)
    for role, given in roles.items():
        for name, value in given.items():
            given[name] = _checked(name, value, values, converters, f"{where}: {role}")
    critic = roles.get("critic", {})
    for name in {"load", "save"} & critic.keys():
        if critic[name] is not None:  # the job may run in another directory
            critic[name] = absolute(critic[name])
    return roles


def check_critic(critic: Critic, algorithm: Algorithm) -> None:
    """Refuse what can't be right.

    Raises:
        UserError: names the flag and its value.
    """
    if critic.value_clip <= 0:
        raise UserError(f"--value-clip {critic.value_clip}: it must be greater than 0.")
    if critic.num_critic_only_steps < 0:
        raise UserError(f"--num-critic-only-steps {critic.num_critic_only_steps}: it can't be negative.")
    if use_critic(algorithm):
        return
    given = {"--critic-load": critic.critic_load, "--critic-save": critic.critic_save,
             "--critic-lr": critic.critic_lr, "--num-critic-only-steps": critic.num_critic_only_steps}  # fmt: skip
    for flag_name, value in given.items():
        if value:
            raise UserError(
                f"{flag_name} {value}: --advantage-estimator {algorithm.advantage_estimator} has no critic; only ppo"
                " has one."
            )


def values_of_critic(critic: Critic, lr: float, save: str | None) -> dict[str, Any]:
    """The values by name that replace the policy's when the critic is trained.

    Args:
        critic: its flags.
        lr: the policy's learning rate.
        save: where the policy's checkpoints go.
    """
    return {
        "lr": lr if critic.critic_lr is None else critic.critic_lr,
        "lr_warmup_iters": critic.critic_lr_warmup_iters,
        "save": critic.critic_save or (str(Path(save) / "critic") if save else None),
        "load": critic.critic_load,
        **json.loads(critic.critic_overrides or "{}"),
    }


def _read_roles(path: str, where: str) -> dict[str, dict[str, Any]]:
    content = read_config_file(path, "--megatron-config-path")
    entries = content.get("megatron")
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise UserError(f"{where}: it must hold `megatron:` with a list of roles.")
    roles: dict[str, dict[str, Any]] = {}
    for entry in entries:
        role, overrides = entry.get("role"), entry.get("overrides", entry.get("args", {}))
        if role not in ROLES:
            raise UserError(f"{where}: role {role!r}: it is actor or critic.")
        if role in roles:
            raise UserError(f"{where}: {role} appears twice.")
        if not isinstance(overrides, dict):
            raise UserError(f"{where}: {role}: overrides must hold names with values.")
        roles[role] = dict(overrides)
    return roles


def _checked(
    name: str,
    value: Any,
    values: Mapping[str, Any],
    converters: Mapping[str, Callable[[str], Any] | None],
    where: str,
) -> Any:
    if name not in values:
        near = nearest(name, values)
        hint = f"did you mean {near}?" if near else "names are flags, with _ for -."
        raise UserError(f"{where}: unknown name {name!r}; {hint}")
    if name in _SHARED and value != values[name]:
        raise UserError(
            f"{where}: {name} is {value!r}, and {values[name]!r} for the whole run: actor and critic share"
            " their ranks and the plan of a step. Give the flag instead."
        )
    convert = converters.get(name)
    # YAML takes 1e-6, without a point, for a text.
    if isinstance(value, str) and convert is not None:
        try:
            return convert(value)
        except ValueError:
            raise UserError(f"{where}: {name} is {value!r}, which is not possible.") from None
    return value
