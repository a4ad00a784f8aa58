"""PPO's critic: its flags, and what the policy and the critic are trained with differently."""

from __future__ import annotations

import argparse
import copy
import difflib
import json
from pathlib import Path
from typing import Any

from rltrain.arguments.config_file import read_config_file
from rltrain.arguments.errors import UserError

ROLES = ("actor", "critic")

# Both run on the same ranks, and share the plan of a step.
_SHARED = (
    "actor_num_nodes", "actor_num_gpus_per_node", "num_nodes", "num_gpus_per_node", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "sequence_parallel", "hf_checkpoint", "global_batch_size",
    "num_steps_per_rollout", "micro_batch_size", "max_tokens_per_gpu",
)  # fmt: skip


def add_critic_flags(group: argparse._ArgumentGroup) -> None:
    """Add them to a group of the parser."""
    add = group.add_argument
    add("--critic-load", metavar="DIR",
        help="first weights of the critic: a model, or checkpoints of a critic (default: the policy's)")  # fmt: skip
    add("--critic-save", metavar="DIR", help="where its checkpoints go (default: critic/ inside --save)")
    add("--critic-lr", type=float, metavar="LR", help="its learning rate (default: --lr)")
    add("--critic-lr-warmup-iters", type=int, default=0, metavar="N", help="optimizer steps (default: 0)")
    add("--num-critic-only-steps", type=int, default=0, metavar="N",
        help="rollouts at the start that train only the critic (default: 0)")  # fmt: skip
    add("--value-clip", type=float, default=0.2, metavar="E",
        help="how far a value may move in one rollout (default: 0.2)")  # fmt: skip
    add("--swap-critic", action=argparse.BooleanOptionalAction, default=True,
        help="keep the model that is not being used in host memory, where there is a GPU (default: yes)")  # fmt: skip
    add("--megatron-config-path", metavar="FILE", help="YAML: other flags for the actor or the critic alone")
    group.set_defaults(critic_overrides=None)


def use_critic(args: argparse.Namespace) -> bool:
    """Whether there is a critic: PPO has one."""
    return args.advantage_estimator == "ppo" and args.loss_type != "sft_loss"


def apply_role_overrides(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Read --megatron-config-path: the actor's overrides into `args`, the critic's aside, for `critic_args`.

    The file holds `megatron: [{role: critic, overrides: {lr: 1e-5}}]`, with attributes' names, as slime has it.

    Raises:
        UserError: another structure, an unknown name, or something that both have to share.
    """
    if args.megatron_config_path is None:
        return
    where = f"--megatron-config-path {args.megatron_config_path}"
    overrides = _read_roles(args.megatron_config_path, where)
    actions = {action.dest: action for action in parser._actions}
    for role, given in overrides.items():
        for name, value in given.items():
            overrides[role][name] = _checked(name, value, args, actions, f"{where}: {role}")
    if overrides.get("critic") and not use_critic(args):
        raise UserError(f"{where}: it has a critic, but only --advantage-estimator ppo trains one.")
    vars(args).update(overrides.get("actor", {}))
    for name in {"load", "save"} & overrides.get("critic", {}).keys():
        if overrides["critic"][name] is not None:  # the job may run in another directory
            overrides["critic"][name] = str(Path(overrides["critic"][name]).expanduser().absolute())
    # As text, because TOML, in which the job stores its flags, has no null.
    args.critic_overrides = json.dumps(overrides.get("critic", {}))


def resolve_critic(args: argparse.Namespace) -> None:
    """Refuse what can't be right.

    Raises:
        UserError: names the flag and its value.
    """
    if args.value_clip <= 0:
        raise UserError(f"--value-clip {args.value_clip}: it must be greater than 0.")
    if args.num_critic_only_steps < 0:
        raise UserError(f"--num-critic-only-steps {args.num_critic_only_steps}: it can't be negative.")
    if use_critic(args):
        return
    given = {"--critic-load": args.critic_load, "--critic-save": args.critic_save,
             "--critic-lr": args.critic_lr, "--num-critic-only-steps": args.num_critic_only_steps}  # fmt: skip
    for flag, value in given.items():
        if value:
            raise UserError(
                f"{flag} {value}: there is no critic with --advantage-estimator {args.advantage_estimator};"
                " only ppo has one."
            )


def critic_args(args: argparse.Namespace) -> argparse.Namespace:
    """The flags as the critic is trained with them."""
    own = copy.copy(args)
    if args.critic_lr is not None:
        own.lr = args.critic_lr
    own.lr_warmup_iters = args.critic_lr_warmup_iters
    own.save = args.critic_save or (str(Path(args.save) / "critic") if args.save else None)
    own.load = args.critic_load
    vars(own).update(json.loads(args.critic_overrides or "{}"))
    return own


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
            raise UserError(f"{where}: {role} is there twice.")
        if not isinstance(overrides, dict):
            raise UserError(f"{where}: {role}: overrides must hold names with values.")
        roles[role] = dict(overrides)
    return roles


def _checked(
    name: str, value: Any, args: argparse.Namespace, actions: dict[str, argparse.Action], where: str
) -> Any:
    if name not in vars(args):
        near = difflib.get_close_matches(name, vars(args), n=1)
        hint = f"did you mean {near[0]}?" if near else "names are those of flags, with _ for -."
        raise UserError(f"{where}: unknown name {name!r}; {hint}")
    if name in _SHARED and value != getattr(args, name):
        raise UserError(
            f"{where}: {name} is {value!r}, and {getattr(args, name)!r} for the whole run: actor and critic share"
            " their ranks and the plan of a step. Give the flag instead."
        )
    action = actions.get(name)
    convert = action.type if action is not None else None
    # YAML takes 1e-6, without a point, for a text.
    if isinstance(value, str) and callable(convert):
        try:
            return convert(value)
        except ValueError:
            raise UserError(f"{where}: {name} is {value!r}, which it can't be.") from None
    return value
