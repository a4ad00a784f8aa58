"""Agents: programs that speak the OpenAI or Anthropic API, trained on the tokens that they sampled."""
