"""The rollout process: prompts → responses → rewards → a batch as Parquet, served to the trainer."""
