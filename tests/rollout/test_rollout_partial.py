"""Partial rollouts: responses that are stopped keep their tokens, and are gone on with."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from fakes.engine_server import FakeEngine, answer
from helpers.rollout import http_client, running, with_engine

from rltrain.data.source import RolloutDataSource
from rltrain.rollout.collect import Collected, collect
from rltrain.rollout.generate.group import GroupRunner
from rltrain.rollout.generate.single_turn import sampling_params
from rltrain.rollout.generate.staleness import mask_earlier
from rltrain.sample import Sample


class AbortableEngine(FakeEngine):
    """Answers even requests at once; of the others, all that are waiting when told to abort get 5 tokens."""

    patient = False  # answers everything

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self._aborted = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        return [*super().routes(), web.post("/abort_request", self.abort), web.get("/workers", self.workers)]

    async def before_answer(self, body: dict[str, Any]) -> None:
        body["stopped"] = not self.patient and len(self.requests) % 2 == 0
        if body["stopped"]:
            await self._aborted.wait()
            body["sampling_params"]["max_new_tokens"] = 5

    def answer(self, body: dict[str, Any], *, aborted: bool) -> dict[str, Any]:
        result = answer(body, aborted=aborted)
        if body["stopped"]:
            result["meta_info"]["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        return result

    async def abort(self, request: web.Request) -> web.Response:
        assert (await request.json())["abort_all"] is True
        self._aborted.set()
        return web.Response()

    async def workers(self, request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"url": self.url}]})


class HalfDoneEngine(AbortableEngine):
    """Answers the first two prompts; of every other prompt the first request, and holds the second."""

    def __init__(self, token: str) -> None:
        super().__init__(token)
        self._seen: dict[tuple[int, ...], int] = {}

    async def before_answer(self, body: dict[str, Any]) -> None:
        prompt = tuple(body["input_ids"])
        count = self._seen[prompt] = self._seen.get(prompt, 0) + 1
        body["stopped"] = not self.patient and list(self._seen).index(prompt) >= 2 and count == 2
        if body["stopped"]:
            await self._aborted.wait()
            body["sampling_params"]["max_new_tokens"] = 5


def two_rollouts(
    config: Any, kind: type[AbortableEngine] = AbortableEngine
) -> tuple[Collected, list[list[Sample]], Collected]:
    """A rollout that stops some groups, what it gave back (after a restart), and the rollout after it."""

    async def use() -> Any:
        async with running(config, kind) as engine:
            source = RolloutDataSource(config.namespace)
            first = await collect(config, 0, source)
            source.save(0)
            restarted = RolloutDataSource(config.namespace)
            restarted.load(0)
            given_back = [list(group) for group in restarted._buffer]
            before = {sample.index: list(sample.tokens) for group in given_back for sample in group}
            engine.patient = True
            second = await collect(config, 1, restarted)
            for group in second.kept:
                for sample in group:
                    prefix = before.get(sample.index, [])
                    assert sample.tokens[: len(prefix)] == prefix
            return first, given_back, second

    return asyncio.run(use())


FLAGS = ("--rollout-batch-size", "2", "--over-sampling-batch-size", "4", "--n-samples-per-prompt", "1",
         "--partial-rollout")  # fmt: skip


def test_stopped_responses_are_gone_on_with_after_a_restart(make_args: Any) -> None:
    first, given_back, second = two_rollouts(make_args(*FLAGS))
    assert len(first.kept) == 2 and first.metrics["rollout/partial/given_back"] == 2
    assert len(given_back) == 2 and second.metrics["rollout/partial/continued"] == 2
    samples = [sample for group in second.kept for sample in group]
    for sample in samples:
        assert sample.response_length == 16 and len(sample.response) == 16  # 5 and 11 more
        assert sample.loss_mask == [1] * 16 and len(sample.rollout_log_probs or []) == 16
        assert sample.metadata["start_rollout_id"] == 0 and sample.status is Sample.Status.TRUNCATED
        assert sample.reward is not None


def test_tokens_of_older_weights_can_be_masked(make_args: Any) -> None:
    *_, second = two_rollouts(make_args(*FLAGS, "--mask-offpolicy-in-partial-rollout"))
    for group in second.kept:
        assert group[0].loss_mask == [0] * 5 + [1] * 11


KEEPS_NO_MASK = """
from rltrain.rollout.sglang_rollout import generate as turn

async def generate(args, sample, sampling_params):
    sample = await turn(args, sample, sampling_params)
    sample.loss_mask = [1] * sample.response_length
    return sample
"""


@pytest.mark.parametrize("own_function", [False, True])
def test_so_are_those_of_samples_that_had_finished(
    make_args: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, own_function: bool
) -> None:
    """A group goes back as a whole: what was finished in it is as old as what was stopped."""
    (tmp_path / "keeps_no_mask.py").write_text(KEEPS_NO_MASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    function = ["--custom-generate-function-path", "keeps_no_mask.generate"] if own_function else []
    config = make_args(*FLAGS, "--n-samples-per-prompt", "2", "--mask-offpolicy-in-partial-rollout",
                       "--apply-chat-template", *function)  # fmt: skip
    first, given_back, second = two_rollouts(config, HalfDoneEngine)
    assert [len(group) for group in given_back] == [2, 2]
    assert all(sample.loss_mask == [1] * 16 for group in first.kept for sample in group)
    for group in second.kept:
        assert sorted(sample.loss_mask or [] for sample in group) == [[0] * 16, [0] * 5 + [1] * 11]
        assert all(sample.reward is not None for sample in group)


def test_what_a_rollout_of_several_samples_has_from_before_is_masked() -> None:
    samples = [
        Sample(tokens=[1, 2, 5, 6, 7], response_length=3, loss_mask=[1, 1, 1]),
        Sample(tokens=[1, 2, 5, 9, 9], response_length=3),  # went on after the first old token
        Sample(tokens=[8, 8, 5], response_length=2, loss_mask=[0, 1]),  # another prompt
        Sample(
            tokens=[1, 2, 5, 6, 7], response_length=2, loss_mask=[1, 1]
        ),  # the first old token is its prompt
    ]
    mask_earlier(samples, [1, 2, 5, 6])
    assert [sample.loss_mask for sample in samples] == [[0, 0, 1], [0, 1, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize(("version", "kept"), [("6", True), ("5", False)])
def test_a_finished_sample_that_is_too_old_is_generated_anew(
    make_args: Any, version: str, kept: bool
) -> None:
    config = make_args("--max-staleness", "2", "--partial-rollout")
    sample = Sample(index=0, group_index=0, tokens=[5, 6], response_length=1, weight_versions=[version],
                    rollout_log_probs=[-1.0], status=Sample.Status.COMPLETED, reward=1.0)  # fmt: skip

    async def use(engine: FakeEngine, client: Any) -> int:
        runner = GroupRunner(config, 8, sampling_params(config.rollout))
        await runner.run([sample])
        return len(engine.requests)

    assert (with_engine(use, config) == 0) is kept


@pytest.mark.slow
def test_a_real_engine_stops_early_and_goes_on(engine: Any, router: Any, make_args: Any) -> None:
    config = make_args(*FLAGS, "--rollout-max-response-len", "64", "--rollout-temperature", "1.5",
                     "--sglang-server-concurrency", "3")  # fmt: skip

    async def use() -> tuple[Collected, int, Collected]:
        async with http_client(config, router.url):
            source = RolloutDataSource(config.namespace)
            first = await collect(config, 0, source)
            waiting = source.get_buffer_length()
            return first, waiting, await collect(config, 1, source)

    first, waiting, second = asyncio.run(use())
    assert waiting == 4 - 2
    for group in first.kept + second.kept:
        for sample in group:
            assert sample.status in (Sample.Status.COMPLETED, Sample.Status.TRUNCATED), sample.failure
            assert sample.response_length <= 64
            assert sample.prefill_seconds > 0 and sample.decode_seconds > 0 and sample.queue_seconds > 0
            assert sample.prefill_seconds + sample.decode_seconds <= sample.generate_seconds
            assert (
                len(sample.rollout_log_probs or []) == len(sample.loss_mask or []) == sample.response_length
            )
