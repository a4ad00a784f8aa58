"""New weights while a real engine generates: no token is lost, and each belongs to exactly one version."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOKEN
from helpers.engine import GivenEngine, GivenWeights, load_weights, running_requests
from helpers.local_job import PATIENCE, wait_until
from helpers.megatron import init_single_process, log_probs_of, make_actor, make_batch, make_config
from helpers.tiny_model import make_model
from safetensors.torch import load_file

from rltrain.arguments.config import Config
from rltrain.data.batch import TrainBatch
from rltrain.megatron.push import WeightPush, make_sender
from rltrain.rollout.generate.single_turn import update_sample
from rltrain.run.http import call
from rltrain.run.role import RoleContext
from rltrain.sample import Sample
from rltrain.sglang import adapter
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.weights import buckets, session
from rltrain.weights.checksums import randomize_weights, wrong_tensors

pytestmark = pytest.mark.slow

PROMPTS = [[4, 13, 5, 16], [7, 8, 9], [20, 21, 22, 23, 24], [30, 4, 5], [6, 6, 6, 6], [40, 41]]
NEW_TOKENS = 300


@pytest.fixture
def other_model(tmp_path: Path, engine: HttpServerEngineAdapter, tiny_model: Path) -> Iterator[Path]:
    """Weights of another seed; afterwards the engine has its own again."""
    yield make_model(tmp_path / "other", seed=1)
    load_weights(engine, tiny_model, "restored")


@pytest.fixture
def process_group() -> None:
    """The trainer has one of its own."""
    init_single_process()


def pushing(transport: str, model: Path, run_dir: Path, mode: str = "full") -> Any:
    """The trainer's pushes by a transport, with buckets so small that the tiny model takes many."""
    config = Config().replace(
        update_weight_mode=mode,
        update_weight_buffer_size=20_000,
        hf_checkpoint=str(model),
        distributed_backend="gloo",
    )
    return Pushing(
        make_sender(transport, config, RoleContext(run_dir, 0, "trainer", 0, "http://127.0.0.1:9", TOKEN)),
        model,
    )


class Pushing:
    """Pushes of tensors that are given."""

    def __init__(self, sender: Any, template: Path) -> None:
        self.sender, self._template = sender, template

    def push(self, version: int, tensors: Any, find_engines: Any) -> dict[str, str]:
        return self.sender.send(version, GivenWeights(lambda: tensors, self._template), find_engines)


def generate(url: str, prompt: list[int], seed: int) -> Sample:
    params = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 1.0, "sampling_seed": seed}
    body = {"input_ids": prompt, "return_logprob": True, "sampling_params": params}
    return update_sample(
        Sample(tokens=list(prompt)), call("POST", f"{url}/generate", TOKEN, body, timeout=PATIENCE)
    )


def log_probs(model_dir: Path, sample: Sample) -> torch.Tensor:
    """log π of each response token, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokens = torch.tensor(sample.tokens)
    with torch.no_grad():
        everything = model(tokens[None]).logits[0].log_softmax(-1)
    return everything[:-1].gather(1, tokens[1:, None])[sample.prompt_length - 1 :, 0]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_every_token_was_sampled_by_the_version_that_its_span_names(
    transport: str, engine: Any, router: Any, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    load_weights(engine, tiny_model, "1")
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = [pool.submit(generate, router.url, prompt, i) for i, prompt in enumerate(PROMPTS)]
        wait_until(lambda: running_requests(engine.url, TOKEN) == len(PROMPTS))
        weights = load_file(other_model / "model.safetensors").items()
        assert pushing(transport, tiny_model, tmp_path).push(2, weights, lambda: [engine]) == {}
        samples = [answer.result(timeout=PATIENCE) for answer in answers]
    for sample in samples:
        assert sample.response_length == NEW_TOKENS
        first, second = sample.weight_version_spans
        assert (first["version"], second["version"]) == ("1", "2")
        assert (first["start"], first["end"], second["end"]) == (0, second["start"], NEW_TOKENS)
        given = torch.tensor(sample.rollout_log_probs)
        before, after = log_probs(tiny_model, sample), log_probs(other_model, sample)
        cut = first["end"]
        torch.testing.assert_close(given[:cut], before[:cut], atol=2e-5, rtol=0)
        torch.testing.assert_close(given[cut:], after[cut:], atol=2e-5, rtol=0)
        assert (after[:cut] - before[:cut]).abs().max() > 1e-2  # the two would be told apart


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_a_push_restores_every_tensor_and_one_that_lacks_some_is_found_out(
    transport: str,
    engine: Any,
    tiny_model: Path,
    other_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buckets, "_APART_BYTES", 1000)  # so that some are sent from where they are
    weights = load_file(tiny_model / "model.safetensors")
    pushes = pushing(transport, tiny_model, tmp_path)
    load_weights(engine, tiny_model, "0")
    expected = randomize_weights([engine])
    assert "lm_head" in wrong_tensors([engine], expected)[engine.url]
    versions = noted_versions(engine, monkeypatch)
    assert pushes.push(3, weights.items(), lambda: [engine]) == {}
    assert wrong_tensors([engine], expected) == {}
    assert engine.get_weight_version() == "3"
    assert len(versions) > 1 and set(versions) == {"0"}  # as long as some are old

    monkeypatch.setattr(
        adapter, "_NOT_PUSHED", (".q_norm.",)
    )  # in place of indexers, which this model has not
    randomize_weights([engine])
    shown = engine.weight_checksums()
    monkeypatch.undo()
    kept = {name for name in expected[engine.url] if ".q_norm." in name}
    assert kept and shown.keys() == expected[engine.url].keys() - kept
    found = engine.weight_checksums()
    assert {name for name, checksum in found.items() if checksum == expected[engine.url][name]} == kept

    randomize_weights([engine])
    call("POST", f"{engine.url}/begin_weight_update", TOKEN, {})  # as if a push had broken off
    lacking = [(name, tensor) for name, tensor in weights.items() if "q_norm" not in name]
    pushes.push(4, lacking, lambda: [engine])
    problem = wrong_tensors([engine], expected)[engine.url]
    assert "layers.1.self_attn.q_norm" in problem and "k_norm" not in problem


def noted_versions(engine: Any, patch: pytest.MonkeyPatch) -> list[str]:
    """What the engine reports after each of the requests that a push then needs, as many as it has rounds."""
    versions: list[str] = []
    load = engine.update_weights_from_tensor

    def noted(*args: Any) -> None:
        versions.append(engine.get_weight_version())
        load(*args)
        versions.append(engine.get_weight_version())

    patch.setattr(session, "_CHANNEL_SECONDS", 0.0)
    patch.setattr(engine, "update_weights_from_tensor", noted)
    return versions


def sparsely_changed(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """One element in fifty is another one, except in every third tensor; one tensor is new altogether."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for i, (name, tensor) in enumerate(weights.items()):
        share = (1.0, 0.02, 0.0)[min(i, 1 + i % 2)]
        where = torch.rand(tensor.shape, generator=generator) < share
        changed[name] = torch.where(where, torch.randn(tensor.shape, generator=generator), tensor)
    return changed


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_changes_alone_give_the_weights_that_all_would(
    transport: str, engine: Any, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    versions = [load_file(other_model / "model.safetensors")]
    for seed in (1, 2, 3):
        versions.append(sparsely_changed(versions[-1], seed))
    checksums = []
    full = pushing("disk", tiny_model, tmp_path / "full")
    for number, weights in enumerate(versions):
        full.push(number, weights.items(), lambda: [engine])
        checksums.append(engine.weight_checksums())
    assert len({str(each) for each in checksums}) == 4

    pushes = pushing(transport, tiny_model, tmp_path / "delta", mode="delta")
    sent = Spy(pushes.sender)
    same_engine = HttpServerEngineAdapter(engine.url.replace("127.0.0.1", "localhost"), TOKEN)
    for number, target in ((0, engine), (1, engine), (2, same_engine), (3, same_engine)):
        assert pushes.push(number, versions[number].items(), lambda: [target]) == {}  # noqa: B023 (called here)
        assert engine.weight_checksums() == checksums[number]
        assert engine.get_weight_version() == str(number)
    everything = sum(tensor.nbytes for tensor in versions[0].values())
    assert (sent.bytes[0], sent.bytes[2]) == (everything, everything)  # to an engine that is not known
    first = next(iter(versions[0].values())).nbytes
    assert all(first < few < first + 0.1 * everything for few in (sent.bytes[1], sent.bytes[3]))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("transport", ["disk", "distributed"])
def test_engines_that_were_given_random_weights_get_more_than_changes(
    transport: str, engine: Any, other_model: Path, tmp_path: Path
) -> None:
    flags = {"update_weight_mode": "delta", "update_weight_transport": transport, "load": "a checkpoint"}
    config = make_config(other_model, check_weight_update_equal=True, **flags)
    context = RoleContext(tmp_path, 0, "trainer", 0, "http://127.0.0.1:9", TOKEN)
    weights, events = load_file(other_model / "model.safetensors"), list[str]()
    given = GivenWeights(weights.items, other_model)
    given_engine = GivenEngine(engine.url, TOKEN)
    WeightPush(config, context, given, lambda kind, **_: events.append(kind)).push(lambda: [given_engine], 5)
    assert events == ["weights_proven"]


@pytest.mark.usefixtures("process_group", "other_model")
def test_an_engine_gets_adapters_merged(engine: Any, router: Any, tiny_model: Path, tmp_path: Path) -> None:
    lora = {"lora_rank": 4, "lora_alpha": 16.0, "lora_target_modules": ["all-linear"], "lr": 0.05}
    config = make_config(tiny_model, **lora, update_weight_transport="disk")
    context = RoleContext(tmp_path, 0, "trainer", 0, "http://127.0.0.1:9", TOKEN)
    actor = make_actor(config, tmp_path)
    actor.train(0, make_batch(8))
    push = WeightPush(config, context, actor._exporter, lambda kind, **_: None)
    push.push(lambda: [GivenEngine(engine.url, TOKEN)], 1)
    sample = generate(router.url, PROMPTS[0], 0)
    assert sample.weight_versions == ["1"]
    mask = np.ones(NEW_TOKENS, np.int8)
    tokens = [np.array(sample.tokens, np.int32)]
    batch = TrainBatch(tokens, [NEW_TOKENS], [mask], np.ones(1, np.float32), None)
    given, own = torch.tensor(sample.rollout_log_probs), torch.from_numpy(log_probs_of(actor, batch)[0])
    torch.testing.assert_close(given, own, atol=2e-5, rtol=0)
    assert (own - log_probs(tiny_model, sample)).abs().max() > 1e-2


class Spy:
    """Notes how much each push has."""

    def __init__(self, sender: Any) -> None:
        self.bytes: list[int] = []
        begin, parts = sender._delta.begin, sender._delta.parts

        def begin_noted(*args: Any) -> Any:
            self.bytes.append(0)
            return begin(*args)

        def parts_noted(*args: Any) -> Any:
            for part in parts(*args):
                self.bytes[-1] += part.data.nbytes
                yield part

        sender._delta.begin, sender._delta.parts = begin_noted, parts_noted
