"""Repairs of Megatron-core that are needed wherever TransformerEngine is missing, with a GPU or without one.

TransformerEngine and Apex bring an Adam, a matrix product for routers and a kernel for rotary embeddings. Megatron-core
also runs without them, except in these places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Repair what lacks TransformerEngine here. Calling it again changes nothing."""
    from rltrain.megatron.versions import define_kernel_names

    _replace_rope()
    define_kernel_names()
    _repair_optimizer_states()


def _replace_rope() -> None:
    """Rotary embeddings of packed sequences by one lookup of each token's position.

    The original slices the frequencies once a sequence, in every layer, and reads the lengths back for it, for which a
    GPU has to be waited for. TransformerEngine's kernel does not come this way.
    """
    from megatron.core.models.common.embeddings import rope_utils

    from rltrain.megatron.model.context_parallel import positions_in_sequence
    from rltrain.megatron.model.layers import cpu_kernels

    def apply_thd(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_group: Any, **options: Any) -> Tensor:
        # As many as tokens: looked up already (`forward_backward`), or there is one sequence. Not so with parts of it.
        if cp_group.size() > 1 or len(freqs) != len(t):
            freqs = freqs[positions_in_sequence(cu_seqlens, len(t), cp_group.size(), cp_group.rank())]
        if cpu_kernels.has_kernels(t) and _is_plain(**options):
            return cpu_kernels.rotate(t, freqs.squeeze(1))
        return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **options).squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = apply_thd


def _is_plain(mscale: float = 1.0, **kinds: bool | None) -> bool:
    """Whether Megatron-core's options of a rotary embedding ask for none of its other kinds."""
    return mscale == 1.0 and not any(kinds.values())


def _repair_optimizer_states() -> None:
    """Checkpoints of a `DistributedOptimizer` over torch's AdamW; nothing is done where its Adam is another.

    TransformerEngine and Apex bring their own Adam; without them Megatron-core takes torch's, whose state differs
    in three ways that `DistributedOptimizer` does not expect. Each of the three methods says which.
    """
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(optimizer_class, "_slurmlime_fixed"):
        return
    state_dict, load_state_dict = optimizer_class.state_dict, optimizer_class.load_state_dict

    def state_dict_with_state(self: Any) -> Any:
        # torch's Adam creates its state in the first step, but a fresh optimizer is asked for it on load.
        if self.optimizer is not None and not self.optimizer.state:
            _create_adam_state(self.optimizer)
        if self.optimizer is None or self.optimizer.state:
            return state_dict(self)
        # This rank's shard is only padding, but the original takes the number of steps from a parameter.
        # Nobody reads this value; the count from ranks with parameters is used.
        self.optimizer.state["padding"] = {"step": torch.tensor(0.0)}
        try:
            return state_dict(self)
        finally:
            del self.optimizer.state["padding"]

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


def _create_adam_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
