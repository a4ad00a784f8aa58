"""A generation function as slime's retool example has them: a template with tools, and calls that are counted."""

import asyncio
import re

from jinja2 import Template

from rltrain.slime import GenerateState, Sample, post
from rltrain.slime import compute_score as math_dapo_compute_score

SEMAPHORE = asyncio.Semaphore(4)
MAX_TURNS, MAX_TOOL_CALLS, TOKENS_PER_TURN = 4, 2, 5
TEMPLATE = Template(
    "system: use {{ tools|join(', ') }}.{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}"
)


async def execute_tool(code: str) -> str:
    async with SEMAPHORE:
        await asyncio.sleep(0)
        return f"(interpreter: {sum(map(int, re.findall(r'[0-9]', code)))})"


async def generate(args, sample: Sample, sampling_params) -> Sample:
    # A sample that was given up comes again: nothing of the first try may stay.
    sample.rollout_log_probs = None
    sample.response = ""
    sample.response_length = 0
    sample.loss_mask = []

    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt = TEMPLATE.render(tools=["code"], messages=[{"role": "user", "content": sample.prompt}])
    prompt_tokens_ids = state.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    sample.tokens = list(prompt_tokens_ids)
    response, response_token_ids = "", []
    loss_masks = sample.loss_mask
    tool_call_count = 0

    for turn in range(MAX_TURNS):
        remaining = args.rollout_max_context_len - len(prompt_tokens_ids) - len(response_token_ids)
        if remaining <= 0:
            sample.status = Sample.Status.TRUNCATED
            break
        turn_params = dict(sampling_params)
        turn_params["max_new_tokens"] = min(TOKENS_PER_TURN, remaining)
        payload = {
            "input_ids": prompt_tokens_ids + response_token_ids,
            "sampling_params": turn_params,
            "return_logprob": True,
        }
        output = await post(url, payload)
        if "output_token_logprobs" not in output["meta_info"]:
            sample.status = Sample.Status.ABORTED
            return sample
        tokens = [item[1] for item in output["meta_info"]["output_token_logprobs"]]
        text = state.tokenizer.decode(tokens)
        response += text
        response_token_ids += tokens
        sample.append_response_tokens(
            args,
            tokens=tokens,
            log_probs=[item[0] for item in output["meta_info"]["output_token_logprobs"]],
            trainable=True,
            meta_info=output["meta_info"],
        )
        if tool_call_count >= MAX_TOOL_CALLS:
            break

        observation = await execute_tool(text)
        tool_call_count += 1
        observation_ids = state.tokenizer(observation, add_special_tokens=False)["input_ids"]
        response += observation
        response_token_ids += observation_ids
        sample.append_response_tokens(args, tokens=observation_ids, trainable=False)
        assert len(response_token_ids) == len(sample.rollout_log_probs), f"turn {turn}"

    sample.tokens = prompt_tokens_ids + response_token_ids
    sample.response_length = len(response_token_ids)
    sample.response = response
    sample.loss_mask = loss_masks
    sample.payload_text = prompt + response
    sample.tool_call_count = tool_call_count
    if sample.status is Sample.Status.PENDING:
        sample.status = Sample.Status.COMPLETED
    return sample


async def reward_func(args, sample, **kwargs):
    result = math_dapo_compute_score(sample.payload_text, sample.label or "", strict_box_verify=True)
    if result["score"] < 0:
        result["score"] = min(-0.6, result["score"] + sample.tool_call_count * 0.1)
    return result
