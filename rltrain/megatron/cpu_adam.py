"""Repairs Megatron-core 0.16's checkpoints of a distributed optimizer over `torch.optim.AdamW`.

TransformerEngine and Apex bring their own Adam; without them Megatron-core takes torch's, whose state differs
in three ways that `DistributedOptimizer` does not expect. Each repair says which.
"""

from __future__ import annotations

from typing import Any

import torch


def fix_checkpointing() -> None:
    """Replace three methods of `DistributedOptimizer`; does nothing where its Adam is not torch's."""
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(optimizer_class, "_slurmlime_fixed"):
        return
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict

    def state_dict_with_state(self: Any) -> Any:
        # torch's Adam creates its state in the first step, but a fresh optimizer is asked for it on load.
        if self.optimizer is not None and not self.optimizer.state:
            _create_state(self.optimizer)
        return state_dict(self)

    def load_state_dict_with_own_steps(self: Any, state: Any) -> None:
        # Every parameter would share one `step` tensor, which each of them increments in every step.
        load_state_dict(self, state)
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    @torch.no_grad()  # the main parameters of an fp32 model are leaves that require gradients
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # `step` is not stored for each parameter, but the original looks for everything in the state.
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for name, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if name != "step":
                target.copy_(tensors[name])

    optimizer_class.state_dict = state_dict_with_state
    optimizer_class.load_state_dict = load_state_dict_with_own_steps
    optimizer_class._set_main_param_and_optimizer_states = set_states
    optimizer_class._slurmlime_fixed = True


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
