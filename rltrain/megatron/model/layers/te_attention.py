"""TransformerEngine's attention, with ours for the micro-batches whose samples share their beginnings.

TransformerEngine packs whole sequences only, so a prompt would be computed once a sample. Its kernel is the faster one
for those, and stays in use where nothing is shared.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rltrain.megatron.model.attention import PackedAttention


@cache
def sharing_attention(kernel: type[Any]) -> type[Any]:
    """A core attention that is `kernel`, but for packed sequences with shared beginnings.

    It is a subclass, so that parameters and checkpoints keep their names.
    """

    class SharingAttention(kernel):
        def __init__(
            self,
            config: TransformerConfig,
            layer_number: int,
            attn_mask_type: Any,
            attention_type: str,
            *args: Any,
            softmax_scale: float | None = None,
            pg_collection: ProcessGroupCollection | None = None,
            **kwargs: Any,
        ) -> None:
            own = {"softmax_scale": softmax_scale, "pg_collection": pg_collection}
            super().__init__(config, layer_number, attn_mask_type, attention_type, *args, **own, **kwargs)
            shared = PackedAttention(config, layer_number, attn_mask_type, attention_type, **own)
            # In a tuple it is no submodule: it has no parameters, and no place in checkpoints.
            self._shared = (shared,)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            packed = kwargs.get("packed_seq_params")
            if getattr(packed, "calls", None) is None:
                whole: Tensor = super().forward(query, key, value, *args, **kwargs)
                return whole
            output: Tensor = self._shared[0](query, key, value, None, packed)
            return output

    return SharingAttention
