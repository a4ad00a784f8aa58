"""A generation function as slime's multi-agent example has them: one prompt becomes the texts of several agents."""

import asyncio
import random
from copy import deepcopy

from transformers import AutoTokenizer

from rltrain.slime import Sample, batched_async_rm, load_function, post

CONFIGS = {
    "custom_multi_agent_function_path": "fakes.slime_examples.agents.run_agent_system",
    "num_parallel": 2,
    "incorrect_reward_weight": 0.8,
}


async def generate_with_multi_agents(args, sample: Sample, sampling_params, evaluation=False) -> list[Sample]:
    args.sampling_params = sampling_params
    args.tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint, trust_remote_code=True)
    for key, value in CONFIGS.items():
        setattr(args, key, value)

    samples = await load_function(args.custom_multi_agent_function_path)(args, sample)
    for each in samples:
        each.rollout_id = sample.index
    random.shuffle(samples)
    return samples


async def generate_response(args, prompt: str, key: str) -> str:
    sample = deepcopy(args.sample)
    prompt_ids = args.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    payload = {"input_ids": prompt_ids, "sampling_params": args.sampling_params, "return_logprob": True}
    output = await post(url, payload)
    tokens = [item[1] for item in output["meta_info"]["output_token_logprobs"]]

    sample.prompt = prompt
    sample.tokens = prompt_ids
    sample.tokens = sample.tokens + tokens
    sample.response_length += len(tokens)
    sample.response = output["text"]
    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    args.results_dict[key].append(sample)
    return output["text"]


async def run_agent_system(args, sample: Sample) -> list[Sample]:
    args = deepcopy(args)
    args.sample = sample
    args.results_dict = {"solver": [], "rewriter": []}

    solvers = [generate_response(args, f"solve: {sample.prompt}", "solver") for _ in range(args.num_parallel)]
    solutions = await asyncio.gather(*solvers)
    await generate_response(args, f"rewrite: {sample.prompt} {' or '.join(solutions)}", "rewriter")

    samples = args.results_dict["solver"] + args.results_dict["rewriter"]
    for each, reward in zip(samples, await batched_async_rm(args, samples), strict=False):
        each.reward = {**reward, "score": reward["score"] * args.incorrect_reward_weight}
    return samples
