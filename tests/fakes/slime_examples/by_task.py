"""One run for all three examples: a prompt's metadata says whose it is."""

from rltrain.slime import load_function

GENERATE = {
    "search": "search.generate",
    "tools": "tools.generate",
    "agents": "agents.generate_with_multi_agents",
}


async def generate(args, sample, sampling_params):
    function = load_function(f"fakes.slime_examples.{GENERATE[sample.metadata['task']]}")
    return await function(args, sample, sampling_params)


REWARD = {"search": "search.reward_func", "tools": "tools.reward_func", "agents": "digits.reward_func"}


async def reward_func(args, sample, **kwargs):
    function = load_function(f"fakes.slime_examples.{REWARD[sample.metadata['task']]}")
    return await function(args, sample, **kwargs)
