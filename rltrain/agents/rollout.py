"""A rollout of an agent: a session, the agent in it, its limits, and one reward for all of its samples."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import time
from collections.abc import Awaitable, Callable
from functools import partial
from numbers import Real
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from rltrain.agents.environments.prompts import with_reward
from rltrain.agents.gateway.server import running_gateway
from rltrain.agents.gateway.session import Session
from rltrain.agents.program import (
    Outcome,
    at,
    environment,
    files_of,
    limits_of,
    outcome_of,
    readable,
    standard_input,
    words_for,
)
from rltrain.agents.sandbox.kinds import launch
from rltrain.agents.sandbox.limits import SandboxError
from rltrain.agents.sandbox.sandbox import Sandbox
from rltrain.arguments.config import Config
from rltrain.arguments.groups.agents import Agents
from rltrain.functions import explain, load_function
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate.http import GenerationError
from rltrain.rollout.generate.single_turn import SamplingParams
from rltrain.sample import Sample

Act = Callable[[Agents, Session, Sample], Awaitable[Outcome]]

_slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def run_command(
    args: argparse.Namespace, sample: Sample, sampling_params: SamplingParams
) -> list[Sample]:
    """The generation function of --agent-command.

    Raises:
        GenerationError: the sandbox or the engines failed again and again.
    """
    return await _rollout(Config.of(args), sample, sampling_params, _in_sandbox)


async def run_function(
    args: argparse.Namespace, sample: Sample, sampling_params: SamplingParams
) -> list[Sample]:
    """The generation function of --agent-function-path.

    Raises:
        GenerationError: the engines failed again and again.
    """
    function = load_function(args.agent_function_path, flag="--agent-function-path")
    return await _rollout(Config.of(args), sample, sampling_params, partial(_called, function))


async def _rollout(config: Config, sample: Sample, params: SamplingParams, act: Act) -> list[Sample]:
    agents, fault = config.agents, ""
    async with _slot(agents):
        for _ in range(agents.agent_retries + 1):
            gateway, limits = running_gateway(), {"max_turns": agents.agent_max_turns}
            async with gateway.open(sample, params, **limits, max_tokens=agents.agent_max_tokens) as session:
                try:
                    outcome = await act(agents, session, sample)
                except SandboxError as error:
                    outcome = None
                    fault = str(error)
            if session.aborted:
                return session.samples()
            if outcome is not None and not (outcome.failure and session.fault):
                return await _graded(config, session, sample, outcome)
            fault = session.fault or fault
    raise GenerationError(
        f"no agent could be run in {agents.agent_retries + 1} tries; the last error: {fault}"
    )


async def _in_sandbox(agents: Agents, session: Session, sample: Sample) -> Outcome:
    """Run the command.

    Raises:
        SandboxError: the sandbox failed.
        ValueError: the prompt's files can't be right.
    """
    files, limits, url = files_of(sample), limits_of(agents), urlsplit(session.base_url)
    assert url.hostname and url.port
    how = launch(agents.agent_sandbox, limits, readable(agents), agents.agent_image)
    async with Sandbox(how, limits, (url.hostname, url.port)) as sandbox:
        for path, text in files.items():
            await sandbox.write(path, text.encode())
        urls = [at(each, sandbox.address) for each in (session.base_url, session.anthropic_base_url)]
        ended = await sandbox.run(
            words_for(agents, sample),
            seconds=agents.agent_timeout,
            given=standard_input(sample, session.model),
            environment=environment(agents, urls[0], urls[1], session.api_key, session.model),
        )
        answer = None
        if agents.agent_answer is not None:
            answer = b""  # it left none
            with contextlib.suppress(FileNotFoundError):
                answer = await sandbox.read(agents.agent_answer)
        outcome = outcome_of(ended, answer)
        return with_reward(outcome) if agents.environment else outcome


async def _called(
    function: Callable[[Session, Sample], Awaitable[Any]], agents: Agents, session: Session, sample: Sample
) -> Outcome:
    """Call the function; what it raises is its own failure."""
    began = time.monotonic()
    outcome = Outcome()
    try:
        async with asyncio.timeout(agents.agent_timeout) as limit:
            result = await function(session, sample)
    except TimeoutError as error:
        late = limit.expired()
        outcome = Outcome(
            failure=f"it took longer than {agents.agent_timeout} s" if late else explain(error), late=late
        )
    except Exception as error:
        outcome = Outcome(failure=explain(error))
    else:
        if isinstance(result, Real) and not isinstance(result, bool):
            outcome = Outcome(reward=float(result))
        elif isinstance(result, str):
            outcome = Outcome(answer=result)
        else:
            name = getattr(function, "__name__", function)
            outcome = Outcome(
                failure=f"{name} returned {type(result).__name__}; expected its answer, or a reward"
            )
    return Outcome(**{**vars(outcome), "seconds": time.monotonic() - began})


async def _graded(config: Config, session: Session, sample: Sample, outcome: Outcome) -> list[Sample]:
    """The session's samples with one reward: the answer's."""
    samples = session.samples()
    if not samples:
        lone = copy.copy(sample)
        lone.metadata = {**sample.metadata, "agent": outcome.record()}
        lone.status = Sample.Status.FAILED
        lone.failure = f"the agent asked for no response: {outcome.failure or 'it ended without an error'}"
        return [lone]
    for each in samples:
        each.metadata["agent"] = {"answer": outcome.answer, "failure": outcome.failure}
        if outcome.late:
            each.status = Sample.Status.TRUNCATED
    samples[0].metadata["agent"] = outcome.record()
    if outcome.reward is not None:
        for each in samples:
            each.reward = outcome.reward
    elif not config.rewards.group_rm:
        await _grade(config, samples, outcome.answer)
    return samples


async def _grade(config: Config, samples: list[Sample], answer: str) -> None:
    """Grade the answer in place of the response, once for all."""
    graded = copy.copy(samples[0])
    graded.response = answer
    await rewards.grade(config, graded)
    samples[0].metadata, samples[0].reward_seconds = graded.metadata, graded.reward_seconds
    for each in samples:
        each.reward = graded.reward
        if graded.failure is not None:
            each.status, each.failure = graded.status, graded.failure


def _slot(agents: Agents) -> contextlib.AbstractAsyncContextManager[Any]:
    """A place among the sessions that may be open at a time."""
    if agents.agent_concurrency is None:
        return contextlib.nullcontext()
    loop = asyncio.get_running_loop()
    return _slots.setdefault(loop, asyncio.Semaphore(agents.agent_concurrency))
