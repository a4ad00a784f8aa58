"""Experts that tokens are sent to again: those that the engine chose, or an earlier pass of the trainer.

A small difference in a router's input can choose other experts, and then log-probs of trainer and engine differ by much
more than by rounding. With --use-rollout-routing-replay (R3, https://arxiv.org/abs/2510.11370) the policy's passes send
every token to the experts that the engine sent it to. With --use-routing-replay the passes that train send it where the
pass before them did, which computed the old log-probs. Only which experts is replayed: their weights are the router's,
and have its gradient.

Routes are [tokens, layers, experts a token], int16; -1 where none is known, as of padding: the router then chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rltrain.packages import hidden

# Megatron-core's own engine would use them: a tenth of a rank's start, and with FlashInfer, as beside SGLang, a third.
with hidden("wandb", "flashinfer"):
    import megatron.core.models.gpt  # noqa: F401
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router import TopKRouter

from rltrain.megatron.model.context_parallel import gather_outputs
from rltrain.megatron.model.names import HEAD

Routes = list[NDArray[np.int16]]  # one array a sample, for all of its tokens but the last


class LayerRoutes:
    """What the router of one layer asks which experts to take; megatron-core's `RouterReplay` in its place.

    Attributes:
        layer: counted from 0.
        recorded: the experts of every pass, [tokens, experts a token] each, while they are recorded.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.recorded: list[Tensor] | None = None
        self._routes: Tensor | None = None
        self._trains = False
        self._again: list[Tensor | None] = []

    def replay(self, routes: Tensor | None, *, trains: bool) -> None:
        """Take these experts, [tokens, experts a token], from now on; None: those that the router chooses.

        Args:
            trains: whether a backward pass follows, which may compute this layer again.
        """
        self._routes, self._trains = routes, trains
        if not trains:
            self._again.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the experts, [tokens, topk] each; megatron-core calls it."""
        assert default_compute_topk is not None
        values, indices = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        routes = self._now()
        if routes is not None:
            wanted = routes.to(indices.device, indices.dtype)
            indices = torch.where(wanted >= 0, wanted, indices)
            values = scores.gather(1, indices)
        if self.recorded is not None:
            self.recorded.append(indices)
        return values, indices

    def _now(self) -> Tensor | None:
        """The routes of this call.

        Where activations are recomputed, a layer is first called without gradients, and again in the backward pass, in
        the order of the first calls: later micro-batches may have been here meanwhile.
        """
        if self._trains and not torch.is_grad_enabled():
            self._again.append(self._routes)
        elif self._trains and self._again:
            return self._again.pop(0)
        return self._routes


def install(models: Sequence[torch.nn.Module]) -> None:
    """Have the routers of these models ask a `LayerRoutes`."""
    for model in models:
        routers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, TopKRouter) and not name.startswith(HEAD)
        ]
        for router in routers:
            router.router_replay = LayerRoutes(router.layer_number - 1)
        setattr(model, _LAYERS, [router.router_replay for router in routers])


_LAYERS = "layer_routes"  # a model's attribute


def layers_of(model: torch.nn.Module) -> list[LayerRoutes]:
    """Those of a model where they are installed."""
    return getattr(model, _LAYERS, [])


def replay(model: Any, routes: Tensor | None, *, trains: bool) -> None:
    """Have the next forward pass take these routes, [own t, layers, experts a token]; None: those of its routers."""
    layers = layers_of(model)
    if routes is not None and layers and model.config.sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        routes = routes.chunk(group.size())[group.rank()]
    for each in layers:
        each.replay(None if routes is None else routes[:, each.layer], trains=trains)


def packed_routes(
    routes: Routes, indices: Sequence[int], starts: Sequence[int], own_tokens: NDArray[np.int64], total: int
) -> Tensor:
    """Those of a rank's tokens in a micro-batch, [own t, layers, experts a token]; -1 for padding.

    Args:
        indices, starts: the samples that are packed, and where each begins among all `total` tokens.
        own_tokens: which of all tokens the rank has.
    """
    packed = np.full((total, *routes[0].shape[1:]), -1, np.int16)
    for i, start in zip(indices, starts, strict=False):
        packed[start : start + len(routes[i])] = routes[i]
    return torch.from_numpy(packed[own_tokens])


def by_layer(flat: Sequence[NDArray[np.int16]], layers: int, experts: int) -> Routes:
    """Routes as the rollout gives them, [tokens, layers · experts a token], with layers and experts apart.

    Raises:
        ValueError: they are not of a model with so many.
    """
    for i, each in enumerate(flat):
        if each.shape[1] != layers * experts:
            raise ValueError(
                f"sample {i}: {each.shape[1]} experts of every token, and the model has {layers} layers with {experts}"
                " experts a token"
            )
    return [each.reshape(len(each), layers, experts) for each in flat]


@contextmanager
def recording(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While entered, the routers note which experts they take; `recorded_routes` gives them out."""
    layers = [each for model in models for each in layers_of(model)]
    for each in layers:
        each.recorded = []
    try:
        yield
    finally:
        for each in layers:
            each.recorded = None


def recorded_routes(
    models: Sequence[Any], micro_batches: Sequence[Any], lengths: Sequence[int], layers: int
) -> Routes:
    """The routes of this rank's samples, from the passes since recording began; none for other samples.

    Only the layers of this pipeline stage are known. Tensor and context parallel ranks bring their tokens together.

    Args:
        lengths: of all samples, in tokens that are computed.
        layers: of the whole model.
    """
    found: list[NDArray[np.int16] | None] = [None] * len(lengths)
    known = [each for model in models for each in layers_of(model)]
    config = models[0].config
    for number, micro_batch in enumerate(micro_batches):
        own = [each.recorded[number].int() for each in known if each.recorded is not None]
        if not own:
            continue
        whole = _of_all_tokens(torch.stack(own, dim=1), micro_batch.sequences.order, config.sequence_parallel)
        experts = whole.cpu().numpy().astype(np.int16)
        starts = np.cumsum([0, *micro_batch.sequences.lengths])
        for i, start in zip(
            micro_batch.indices, starts, strict=False
        ):  # what follows the last sample is padding
            routes = np.full((lengths[i], layers, experts.shape[-1]), -1, np.int16)
            routes[:, [each.layer for each in known]] = experts[start : start + lengths[i]]
            found[i] = routes
    shape = next((each.shape[1:] for each in found if each is not None), (layers, 1))
    return [np.empty((0, *shape), np.int16) if each is None else each for each in found]


def _of_all_tokens(own: Tensor, order: Tensor | None, sequence_parallel: bool) -> Tensor:
    """Something of all tokens of a micro-batch from what a rank has of it, [own tokens, …] int32."""
    if sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        own = torch.cat(parts)
    if order is None:
        return own
    return gather_outputs(own, order, parallel_state.get_context_parallel_group())
