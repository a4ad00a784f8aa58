"""Rewards: built-in rules, and a pool of processes that runs any reward function safely."""
