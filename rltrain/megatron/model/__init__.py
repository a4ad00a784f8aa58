"""The Megatron-core model: built, loaded, exported."""
