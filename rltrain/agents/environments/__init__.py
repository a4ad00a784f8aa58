"""Environment packages as agents: their data set is the prompts, their rollout the agent, their score the reward."""
