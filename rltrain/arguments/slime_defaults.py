"""What slime's function flags name by default, with our own paths."""

DEFAULT_ROLLOUT_FUNCTION = "rltrain.rollout.sglang_rollout.generate_rollout"
SFT_ROLLOUT_FUNCTION = "rltrain.rollout.sft_rollout.generate_rollout"
DEFAULT_DATA_SOURCE = "rltrain.data.source.RolloutDataSource"
