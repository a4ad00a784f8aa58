"""A generation function as slime's search example has them: the model writes, a search answers, the model writes on."""

import re

from rltrain.slime import GenerateState, Sample, post

MAX_TURNS = 3
TOKENS_PER_TURN = 6
DOCUMENTS = {str(digit): f"the sum with {digit} is {digit + 1}" for digit in range(10)}


async def search(query: str) -> str:
    return DOCUMENTS[query]


async def execute(prediction: str) -> tuple[str, bool]:
    """What the environment says to a turn, and whether it was the last."""
    if "=" in prediction:
        return "", True
    found = re.search(r"\d", prediction)
    if found is None:
        return " i found no digit. try again: ", False
    return f" found: {await search(found[0])}. ", False


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout, "not for partial rollouts"
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"

    prompt_token_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    response, response_token_ids, loss_mask, log_probs = "", [], [], []
    sampling_params = {**sampling_params, "max_new_tokens": TOKENS_PER_TURN}

    for _ in range(MAX_TURNS):
        payload = {
            "input_ids": prompt_token_ids + response_token_ids,
            "sampling_params": sampling_params,
            "return_logprob": True,
        }
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample

        tokens = [item[1] for item in output["meta_info"]["output_token_logprobs"]]
        response += state.tokenizer.decode(tokens)
        response_token_ids += tokens
        loss_mask += [1] * len(tokens)
        log_probs += [item[0] for item in output["meta_info"]["output_token_logprobs"]]

        observation, done = await execute(state.tokenizer.decode(tokens))
        if done:
            break
        observation_ids = state.tokenizer(observation, add_special_tokens=False)["input_ids"]
        response += observation
        response_token_ids += observation_ids
        loss_mask += [0] * len(observation_ids)
        log_probs += [0.0] * len(observation_ids)

    sample.tokens = prompt_token_ids + response_token_ids
    sample.response_length = len(response_token_ids)
    sample.response = response
    sample.loss_mask = loss_mask
    sample.rollout_log_probs = log_probs
    sample.status = Sample.Status.COMPLETED
    return sample


async def reward_func(args, sample, **kwargs):
    """Searches pay, a little less each."""
    if not isinstance(sample, Sample):
        raise TypeError("sample must be an instance of Sample")
    return {"score": 1 - 0.5 ** sample.response.count("found: "), "pred": sample.response[:1]}
