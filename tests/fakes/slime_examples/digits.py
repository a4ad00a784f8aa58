"""The reward of the agents' texts, a module of its own as slime's are: the agents' imports torch, by transformers."""


async def reward_func(args, sample, **kwargs):
    return {"score": sum(letter.isdigit() for letter in sample.response) / 8, "pred": ""}
