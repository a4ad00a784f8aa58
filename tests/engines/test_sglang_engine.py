"""A real SGLang server behind the real router: numbers, weights, control, authentication."""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import TOKEN
from helpers.engine import load_weights, running_requests
from helpers.local_job import PATIENCE, listening, own_addresses, process_tree, wait_until
from helpers.megatron import init_single_process, log_probs_of, make_actor, tiny_config, write_hf_model
from helpers.megatron import make_config as trainer_config
from helpers.tiny_model import make_model

from rltrain.data.batch import TrainBatch
from rltrain.data.source import RolloutDataSource
from rltrain.rewards import pool as rewards
from rltrain.rollout.generate.http import HttpClient, set_client
from rltrain.rollout.sglang_rollout import generate_rollout
from rltrain.run.http import HttpError, call
from rltrain.sample import Sample
from rltrain.sglang.adapter import BEGIN_PUSH, END_PUSH, HttpServerEngineAdapter
from rltrain.sglang.router import Router
from rltrain.sglang.routers import find_worker

pytestmark = pytest.mark.slow

PROMPT = [4, 13, 5, 16]


def generate(url: str, token: str = TOKEN, **params: Any) -> dict[str, Any]:
    body = {"input_ids": PROMPT, "return_logprob": True, "sampling_params": {"temperature": 0, **params}}
    return call("POST", f"{url}/generate", token, body)


def greedy(url: str) -> list[int]:
    return generate(url, max_new_tokens=12)["output_ids"]


def rollout(args: argparse.Namespace, router: Router, rollout_id: int = 0) -> list[Sample]:
    url = urlsplit(router.url)
    args.namespace.sglang_router_ip, args.namespace.sglang_router_port = url.hostname, url.port

    async def main() -> list[Sample]:
        client = HttpClient(TOKEN)
        set_client(client)
        try:
            output = await generate_rollout(args.namespace, rollout_id, RolloutDataSource(args.namespace))
            return [sample for group in output.samples for sample in group]
        finally:
            await rewards.close()
            await client.close()

    return asyncio.run(main())


def test_log_probs_are_those_of_transformers(engine, router, make_args, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    samples = rollout(make_args("--rollout-temperature", "0.7"), router)
    assert sum(sample.response_length for sample in samples) > 40
    for sample in samples:
        tokens = torch.tensor([sample.tokens])
        with torch.no_grad():
            log_probs = (model(tokens).logits[0] / 0.7).log_softmax(-1)
        response = tokens[0, sample.prompt_length :]
        expected = log_probs[sample.prompt_length - 1 : -1].gather(-1, response[:, None])[:, 0]
        np.testing.assert_allclose(sample.rollout_log_probs, expected.numpy(), atol=1e-4)


def test_a_rollout_can_be_repeated_token_for_token(engine, router, make_args) -> None:
    args = make_args("--sglang-enable-deterministic-inference", "--rollout-max-response-len", "32")
    first = rollout(args, router)
    args = args.replace(sglang_server_concurrency=3)  # other batches than before
    assert [sample.tokens for sample in rollout(args, router)] == [sample.tokens for sample in first]
    assert [sample.tokens for sample in rollout(args, router, rollout_id=1)] != [
        sample.tokens for sample in first
    ]
    assert len({tuple(sample.tokens) for sample in first}) == len(first)


def test_the_whole_context_can_be_used(engine, router, make_args) -> None:
    args = make_args("--rollout-max-response-len", "1000", "--rollout-stop-token-ids", "63")
    assert args.rollout.rollout_max_context_len == 512
    samples = rollout(args, router)
    assert {sample.status for sample in samples} <= {Sample.Status.COMPLETED, Sample.Status.TRUNCATED}
    assert all(len(sample.tokens) <= 512 for sample in samples)
    assert all(len(sample.tokens) == 512 for sample in samples if sample.status is Sample.Status.TRUNCATED)


@pytest.fixture
def restored(engine: HttpServerEngineAdapter, tiny_model: Path) -> Iterator[None]:
    """Whatever a test does to the weights is undone."""
    yield
    load_weights(engine, tiny_model, "restored")


def test_an_update_from_disk_changes_outputs_and_version(engine, router, restored, tmp_path: Path) -> None:
    before = greedy(router.url)
    assert greedy(router.url) == before
    engine.pause_generation()
    load_weights(engine, make_model(tmp_path / "other", seed=1), "7")
    engine.continue_generation()
    assert engine.get_weight_version() == "7"
    answer = generate(router.url, max_new_tokens=12)
    assert answer["output_ids"] != before
    assert answer["meta_info"]["weight_version"] == "7"


def test_samples_record_the_version_of_their_weights(engine, router, restored, make_args, tiny_model) -> None:
    load_weights(engine, tiny_model, "11")
    assert {tuple(sample.weight_versions) for sample in rollout(make_args(), router)} == {("11",)}


def test_an_update_from_a_directory_without_weights_is_refused(engine, router, tmp_path: Path) -> None:
    with pytest.raises(HttpError) as caught:
        engine.update_weights_from_disk(tmp_path, "8")
    assert caught.value.status == 400
    assert engine.get_weight_version() != "8"
    greedy(router.url)


class Background:
    """One long request in a thread."""

    def __init__(self, url: str) -> None:
        self.answer: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, args=(url,))
        self._thread.start()

    def _run(self, url: str) -> None:
        self.answer = generate(url, max_new_tokens=480, ignore_eos=True)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> dict[str, Any]:
        self._thread.join(timeout=PATIENCE)
        assert self.answer is not None
        return self.answer


def test_a_paused_engine_keeps_requests_over_an_update(engine, router, restored, tiny_model: Path) -> None:
    request = Background(router.url)
    wait_until(lambda: running_requests(engine.url, TOKEN) == 1)
    engine.pause_generation("retract")
    load_weights(engine, tiny_model, "12")
    assert request.running and engine.health()
    engine.continue_generation()
    answer = request.wait()["meta_info"]
    assert answer["completion_tokens"] == 480
    assert [span["version"] for span in answer["weight_versions"]][-1] == "12"


def test_abort_ends_requests_with_what_they_have(engine, router) -> None:
    request = Background(router.url)
    wait_until(lambda: running_requests(engine.url, TOKEN) == 1)
    engine.abort()
    answer = request.wait()["meta_info"]
    assert answer["finish_reason"]["type"] == "abort"
    assert answer["completion_tokens"] < 480


@pytest.mark.parametrize(
    "path",
    ["/generate", "/update_weights_from_disk", "/pause_generation", "/flush_cache", BEGIN_PUSH, END_PUSH],
)
@pytest.mark.parametrize("token", ["", "wrong"])
def test_the_engine_refuses_without_the_token(engine, path: str, token: str) -> None:
    with pytest.raises(HttpError) as caught:
        call("POST", engine.url + path, token, {})
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/generate"), ("GET", "/workers"), ("POST", "/workers")]
)
def test_the_router_refuses_without_the_token(engine, router, method: str, path: str) -> None:
    with pytest.raises(HttpError) as caught:
        call(method, router.url + path, "wrong", {} if method == "POST" else None)
    assert caught.value.status == 401


def test_an_engine_leaves_and_joins_the_router(engine, router) -> None:
    assert find_worker(router.url, TOKEN, engine.url) is not None
    engine.unregister(router.url)
    assert find_worker(router.url, TOKEN, engine.url) is None
    with pytest.raises(HttpError, match="503"):
        greedy(router.url)
    engine.unregister(router.url)  # not being there is no error
    engine.register(router.url)
    greedy(router.url)


def test_an_engine_that_somebody_else_started_can_be_attached_to(engine) -> None:
    attached = HttpServerEngineAdapter(engine.url, TOKEN)
    assert attached.health() and attached.get_weight_version() == engine.get_weight_version()
    attached.shutdown()  # is not ours to end
    assert engine.health()
    assert not HttpServerEngineAdapter("http://127.0.0.1:9", TOKEN).health()


@pytest.mark.parametrize("paused", [False, True])
def test_an_idle_engine_leaves_the_cores_alone(engine, paused: bool) -> None:
    import psutil

    server = psutil.Process(engine.pid)
    processes = [server, *server.children(recursive=True)]

    def cpu_seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    wait_until(lambda: running_requests(engine.url, TOKEN) == 0)
    if paused:
        engine.pause_generation()
    least = 1.5
    for _ in range(8):  # on a busy machine the first seconds may still be of what was asked before
        before = cpu_seconds()
        time.sleep(1.5)
        least = min(least, cpu_seconds() - before)
        if least < 0.3:
            break
    engine.continue_generation()
    assert least < 0.3


def test_a_tensor_parallel_engine_without_weights_of_its_own_computes_the_same(
    engine, tiny_model: Path, tiny_tokenizer: Path
) -> None:
    server_args = {"model_path": str(tiny_tokenizer), "load_format": "dummy", "tp_size": 2}
    with HttpServerEngineAdapter.launch(server_args, TOKEN) as parallel:
        before = greedy(parallel.url)
        load_weights(parallel, tiny_model, "1")
        assert greedy(parallel.url) == greedy(engine.url) != before


def test_a_glm4_engine_samples_with_the_trainers_log_probs(tmp_path: Path) -> None:
    config = tiny_config("Glm4ForCausalLM", pad_token_id=None, head_dim=16, vocab_size=64)
    actor_args = trainer_config(write_hf_model(tmp_path / "model", config))
    init_single_process()
    actor = make_actor(actor_args, tmp_path)
    actor.export(tmp_path / "exported")
    server_args = {"model_path": str(tmp_path / "exported"), "skip_tokenizer_init": True, "random_seed": 0}
    with HttpServerEngineAdapter.launch(server_args, TOKEN) as engine:
        answer = generate(engine.url, max_new_tokens=24, temperature=1.0, ignore_eos=True)
        check_prompts_are_computed_once(engine.url, vocab_size=64)
    response = answer["output_ids"]
    sampled = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]], np.float32)
    batch = TrainBatch(
        tokens=[np.array(PROMPT + response, np.int32)],
        response_lengths=[len(response)],
        loss_masks=[np.ones(len(response), np.int8)],
        train_rewards=np.zeros(1, np.float32),
        rollout_log_probs=[sampled],
    )
    assert len(response) == 24
    np.testing.assert_allclose(sampled, log_probs_of(actor, batch)[0], atol=1e-5)


def check_prompts_are_computed_once(url: str, vocab_size: int) -> None:
    """Of requests that come together, with four for each prompt."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocab_size, (12, 100)).tolist()
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    answers = call("POST", f"{url}/generate", TOKEN, {"input_ids": prompts * 4, "sampling_params": params})
    for copies in zip(*(answers[i : i + 12] for i in range(0, 48, 12)), strict=True):
        assert all(each["output_ids"] == copies[0]["output_ids"] for each in copies)
    metas = [each["meta_info"] for each in answers]
    computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
    assert computed < 2400  # of 4800: copies are computed that came in a batch with nothing else to do


def test_strangers_get_counters_at_most(engine, router) -> None:
    """Both listen on one address only; without the token they answer what docs/security.md names."""
    ports = listening(process_tree(engine.pid))
    assert set(ports) == {"engine", "engine's ranks"}
    assert {address for found in ports.values() for address, *_ in found} <= own_addresses()

    paths = [
        "/generate",
        "/server_info",
        "/get_server_info",
        "/model_info",
        "/v1/models",
        "/engine_metrics",
        "/workers",
    ]
    paths += [
        "/health",
        "/metrics",
        "/update_weights_from_disk",
        "/pause_generation",
        "/flush_cache",
        "/docs",
    ]
    answers = {
        url: {path for path in paths for method in ("GET", "POST") if stranger(method, url + path) == 200}
        for url in (engine.url, router.url)
    }
    assert answers[engine.url] == {"/health", "/metrics"}
    assert answers[router.url] == {"/health", "/v1/models", "/get_server_info", "/engine_metrics"}


def stranger(method: str, url: str) -> int:
    try:
        call(method, url, "", {} if method == "POST" else None)
    except HttpError as error:
        return error.status
    return 200
