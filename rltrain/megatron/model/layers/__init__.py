"""Parts of transformer layers that Megatron-core lacks."""
