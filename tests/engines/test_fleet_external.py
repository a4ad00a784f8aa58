"""Engines and routers that a job uses without having started them, and what the real router does with its flags."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKEN
from helpers.engine import load_weights
from helpers.local_job import OPEN_TO_ALL, documented_processes, look_at_run, own_addresses
from helpers.tiny_model import make_model

from rltrain.arguments.external import TOKEN_VARIABLE
from rltrain.rollout.generate.http import GenerationError, HttpClient
from rltrain.run.errors import UserError
from rltrain.run.http import HttpError, call
from rltrain.run.layout import RunLayout
from rltrain.sglang.engines import check_engine
from rltrain.sglang.external import ExternalFleet
from rltrain.sglang.router import Router
from rltrain.sglang.routers import RouterAddress, find_worker
from rltrain.weights.transports.current import set_current

pytestmark = pytest.mark.slow

PROMPT = {"input_ids": [4, 13, 5, 16], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}


class Events:
    """Keeps them."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def event(self, kind: str, **fields: object) -> None:
        self.kinds.append(kind)


@pytest.fixture
def own_router() -> Any:
    """One for which no engine is known yet."""
    with Router({}, "another-token") as router:
        yield router


def test_external_engines_come_go_and_have_the_current_weights(
    engine, own_router: Router, tiny_model: Path, make_args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    layout, names, events = RunLayout(tmp_path / "external"), tmp_path / "engines.txt", Events()
    args = make_args("--rollout-external-engines-file", str(names))
    fleet = ExternalFleet(args.engines, args.model, layout, events)
    router = RouterAddress(own_router.url, "another-token")

    def joined() -> bool:
        fleet.look(router)
        return find_worker(router.url, router.token, engine.url) is not None

    def answer() -> dict[str, Any]:
        return call("POST", f"{router.url}/generate", router.token, PROMPT)["meta_info"]

    try:
        names.write_text(f"{engine.url}\n")
        assert not joined()  # the trainer has not sent any weights
        for version, seed in ((1, 0), (2, 1)):
            set_current(make_model(layout.weights / f"v{version:06d}", seed=seed))
            assert joined()
            assert answer()["weight_version"] == str(version)
        load_weights(engine, tiny_model, "default")  # as one that has restarted by itself
        assert joined()
        assert answer()["weight_version"] == "2"
        layout.status.write_text('{"phase": "weights"}')
        names.write_text("")
        assert joined()  # while the trainer hands out weights, nothing is changed
        layout.status.unlink()
        names.write_text("half a line")
        assert joined()
        names.write_text(f"{engine.url}\n127.0.0.1:9\n")
        assert joined()  # one that does not answer keeps nobody out
        names.write_text("")
        assert not joined()
    finally:
        load_weights(engine, tiny_model, "restored")
    assert events.kinds == ["external_engine_joined", "external_engine_left"] * 3


@pytest.mark.parametrize("has_own_router", [True, False])
def test_a_run_on_external_engines_listens_as_the_documentation_says(
    engine, tiny_model: Path, tmp_path: Path, has_own_router: bool
) -> None:
    """It has a router without engines of its own, or none, and keeps the external token as it keeps its own."""
    flags = "--num-rollout=2 --rollout-batch-size=2 --n-samples-per-prompt=2 --rollout-max-response-len=4"
    flags += " --rm-type=exact --wandb-mode=disabled --update-weight-transport=disk"
    flags += f" --rollout-external-engine-addrs={engine.url}"
    try:
        with nullcontext() if has_own_router else Router({}, TOKEN) as router:
            if router is not None:
                host, port = RouterAddress(router.url, TOKEN).host_and_port
                flags += f" --sglang-router-ip={host} --sglang-router-port={port}"
            seen = look_at_run(tmp_path, tiny_model, *flags.split(), **{TOKEN_VARIABLE: TOKEN})
    finally:
        load_weights(engine, tiny_model, "restored")
    others = {"srun", "engine", "engine's ranks", *([] if has_own_router else ["router"])}
    assert set(seen.ports) == documented_processes() - others
    assert {address for found in seen.ports.values() for address, *_ in found} <= own_addresses()
    assert seen.secret_shown == []
    if seen.taken is not None:
        assert (seen.taken["files"], seen.taken["sockets"]) == ([str(OPEN_TO_ALL)], [])
        answered = {url.partition("//")[2].partition("/")[0] for url in seen.taken["urls"]}
        assert answered == {f"{address}:{port}" for address, port in seen.ports.get("router", [])}


def test_an_engine_of_another_shape_or_vocabulary_is_refused(
    engine, make_args, tiny_model: Path, tmp_path: Path
) -> None:
    assert check_engine(make_args("--bf16").model, engine) == [
        f"the engine {engine.url} computes in float32, the trainer in bfloat16: weights are converted on loading"
    ]
    args = make_args()
    assert check_engine(args.model, engine) == []
    other = make_model(tmp_path / "other", weights=False)
    config = (other / "config.json").read_text()
    args = args.replace(hf_checkpoint=str(other))
    for old, new, words in (
        (
            '"vocab_size": 64',
            '"vocab_size": 128',
            "vocab_size is 64 there and 128 here .it is padded differently",
        ),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "num_layers is 2 there and 3 here"),
        ("Qwen3ForCausalLM", "LlamaForCausalLM", "a .'Qwen3ForCausalLM'., but the trainer trains"),
    ):
        assert old in config
        changed = json.loads(config.replace(old, new))
        changed.pop("layer_types", None)  # it has an entry a layer
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            check_engine(args.model, engine)


def test_no_endpoint_of_an_engine_answers_without_the_token(engine) -> None:
    paths = call("GET", f"{engine.url}/openapi.json", TOKEN)["paths"]
    free = {"/health", "/health_generate", "/ping", "/ready"}  # probes, which tell nothing
    answered = []
    for path, methods in paths.items():
        for method in set(methods) & {"get", "post", "put", "delete"} if path not in free else ():
            try:
                call(
                    method.upper(),
                    engine.url + path.replace("{", "").replace("}", ""),
                    "wrong",
                    {},
                    timeout=10,
                )
                answered.append(path)
            except HttpError as error:
                if error.status != 401:
                    answered.append(path)
    assert answered == []
    assert {"/update_weights_from_disk", "/update_weights_from_tensor", "/weights_checker"} <= set(paths)


def test_an_answer_of_unknown_weights_is_not_taken(engine) -> None:
    async def ask() -> None:
        client = HttpClient(TOKEN)
        client.refuse_unknown_weights(engine.url)
        try:
            await client.post(f"{engine.url}/generate", PROMPT, retry_seconds=0.3)
        finally:
            await client.close()

    assert not engine.get_weight_version().isdigit()
    with pytest.raises(GenerationError, match="weights of the unknown version"):
        asyncio.run(ask())


@pytest.mark.skipif(importlib.util.find_spec("smg") is None, reason="smg is not installed")
def test_smg_in_place_of_sglang_router(engine) -> None:
    with Router({}, TOKEN, program="smg") as router:
        engine.register(router.url)
        assert call("POST", f"{router.url}/generate", TOKEN, PROMPT)["output_ids"]
        with pytest.raises(HttpError, match="401"):
            call("POST", f"{router.url}/generate", "wrong", PROMPT)
        engine.unregister(router.url)
