"""Which models, routers and engines the flags describe, and what is refused with which words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import yaml
from helpers.run_files import LEAST

from hpc.planning.job_plan import make_plan
from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.arguments.external import TOKEN_VARIABLE, external_token, external_urls
from rltrain.arguments.fleet import (
    engine_specs,
    is_disaggregated,
    models,
    trained_engines,
    trained_model,
)
from rltrain.arguments.groups.debug import Debug
from rltrain.arguments.groups.engines import Engines
from rltrain.rollout.generate.group import slot_count
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.run.role import RoleContext
from rltrain.sglang.adapter import HttpServerEngineAdapter
from rltrain.sglang.engine import engine_server_args
from rltrain.sglang.engine import main as start_engine
from rltrain.sglang.process import ServerDiedError
from rltrain.sglang.router import router_args
from rltrain.sglang.routers import RouterAddress, get_model_url, set_routers
from rltrain.weights.nccl import nccl_settings
from rltrain.weights.transports.choose import choose

ACTOR = {"name": "actor", "server_groups": [
    {"worker_type": "regular", "num_gpus": 2, "num_gpus_per_engine": 1},
    {"worker_type": "placeholder", "num_gpus": 1},
    {"worker_type": "regular", "num_gpus": 2, "num_gpus_per_engine": 2, "overrides": {"mem-fraction-static": 0.7}},
]}  # fmt: skip
JUDGE = {"name": "judge", "model_path": "/models/judge", "num_gpus_per_engine": 2,
         "server_groups": [{"worker_type": "regular", "num_gpus": 4}]}  # fmt: skip
APART = {"name": "apart", "server_groups": [
    {"worker_type": "prefill", "num_gpus": 1}, {"worker_type": "decode", "num_gpus": 2, "num_gpus_per_engine": 2},
]}  # fmt: skip


def parse(*flags: str) -> Config:
    return arguments.parse([*LEAST, *flags])


def config(path: Path, *served: Any) -> list[str]:
    file = path / "fleet.yaml"
    file.write_text(yaml.safe_dump({"sglang": list(served)}))
    return ["--sglang-config", str(file)]


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    return str(caught.value)


def test_without_a_file_it_is_one_model_with_engines_that_are_alike() -> None:
    args = parse("--rollout-num-gpus", "4", "--rollout-num-gpus-per-engine", "2")
    assert [(spec.num_gpus, spec.first_gpu, spec.worker_type) for spec in engine_specs(args.engines, args.debug)] == [
        (2, 0, "regular"), (2, 2, "regular"),
    ]  # fmt: skip
    assert [(model["name"], model["model_path"]) for model in models(args.engines, "m")] == [("default", "m")]
    assert trained_engines(args.engines, args.debug) == [0, 1]


def test_a_file_describes_models_groups_and_overrides(tmp_path: Path) -> None:
    args = parse(*config(tmp_path, ACTOR, JUDGE), "--sglang-mem-fraction-static", "0.5")
    specs = engine_specs(args.engines, args.debug)
    assert [(spec.model, spec.num_gpus, spec.first_gpu) for spec in specs] == [
        (0, 1, 0), (0, 1, 1), (0, 2, 3), (1, 2, 5), (1, 2, 7),
    ]  # fmt: skip
    assert args.engines.rollout_num_gpus == 9
    assert trained_engines(args.engines, args.debug) == [0, 1, 2] and trained_model(args.engines) == 0
    first, third, judge = (engine_server_args(args, i) for i in (0, 2, 3))
    assert (first["mem_fraction_static"], third["mem_fraction_static"]) == (0.5, 0.7)
    assert first["model_path"] == str(Path("model").absolute()) and judge["model_path"] == "/models/judge"
    assert len({engine_server_args(args, i)["random_seed"] for i in range(5)}) == 5


def test_the_models_survive_the_run_directory(tmp_path: Path) -> None:
    import tomli_w

    args = parse(*config(tmp_path, ACTOR, JUDGE))
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"train": arguments.dump(args)}))
    loaded = arguments.load(tmp_path)
    assert engine_specs(loaded.engines, loaded.debug) == engine_specs(args.engines, args.debug)


def test_every_model_has_a_router_and_every_engine_a_process(tmp_path: Path) -> None:
    names = [process.name for process in make_plan(parse(*config(tmp_path, ACTOR, JUDGE))).processes]
    assert names[:7] == ["router-0", "router-1", "engine-0", "engine-1", "engine-2", "engine-3", "engine-4"]


def test_rollout_functions_find_the_routers_by_the_models_names(tmp_path: Path) -> None:
    args = parse(*config(tmp_path, JUDGE, ACTOR))
    set_routers(args, [RouterAddress("http://a:1", ""), RouterAddress("http://b:2", "")])
    assert get_model_url(args.namespace, "judge", "/v1/chat/completions") == "http://a:1/v1/chat/completions"
    assert (args.namespace.sglang_router_ip, args.namespace.sglang_router_port) == ("b", 2)
    with pytest.raises(ValueError, match=r"no model 'jugde', but 'judge', 'actor'"):
        get_model_url(args.namespace, "jugde")


def test_prefill_and_decode_are_passed_to_engines_and_router(tmp_path: Path) -> None:
    args = parse(*config(tmp_path, APART), "--router-policy", "random")
    assert is_disaggregated(args.engines, args.debug, 0)
    assert router_args(args.engines, args.debug, 0) == {"pd_disaggregation": True, "policy": "random"}
    assert [engine_server_args(args, i)["disaggregation_mode"] for i in (0, 1)] == ["prefill", "decode"]
    assert "pd_disaggregation" not in router_args(Engines(), Debug(), 0)


@pytest.mark.parametrize(
    ("served", "words"),
    [
        ([], "a list of models under `sglang:`"),
        ([{"server_groups": []}], "model 1: it needs a name"),
        ([{"name": "a", "groups": []}], "unknown entry 'groups'"),
        ([{"name": "a", "modelpath": ""}], "did you mean model_path?"),
        ([{"name": "a", "server_groups": [{"worker_type": "odd", "num_gpus": 1}]}], "group 1: worker_type 'odd'"),
        ([{"name": "a", "server_groups": [{"worker_type": "regular"}]}], "not None"),
        ([{"name": "a", "server_groups": [{"worker_type": "regular", "num_gpus": 3, "num_gpus_per_engine": 2}]}],
         "num_gpus 3 is not a multiple of num_gpus_per_engine 2"),
        ([{"name": "a", "server_groups": [{"worker_type": "prefill", "num_gpus": 1}]}], "of the types prefill"),
        ([{"name": "a", "server_groups": [{"worker_type": "placeholder", "num_gpus": 1}]}], "start no engine"),
        ([{"name": "a", "server_groups": [{"worker_type": "regular", "num_gpus": 1, "overrides": {"port": 1}}]}],
         "port, which the job itself sets"),
        ([ACTOR, ACTOR], "two models have the name 'actor'"),
        ([JUDGE], "none of the models judge is trained"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, served: list[Any], words: str) -> None:
    assert words in refusal(*config(tmp_path, *served))


def test_gpus_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    assert "have 4 GPUs together" in refusal(
        *config(tmp_path, {**JUDGE, "update_weights": True}), "--rollout-num-gpus", "3"
    )


def test_external_engines_need_no_engines_of_our_own() -> None:
    args = parse("--rollout-external-engine-addrs", "a:1", "http://b:2/", "a:1")
    assert external_urls(args.engines) == ["http://a:1", "http://b:2"]
    assert engine_specs(args.engines, args.debug) == []
    assert [process.name for process in make_plan(args).processes] == ["router-0", "rollout-0", "trainer-0"]
    both = parse("--rollout-external-engine-addrs", "a:1", "--rollout-num-gpus", "1")
    assert len(engine_specs(both.engines, both.debug)) == 1


def test_a_file_of_engines_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "engines.txt"
    args = parse("--rollout-external-engines-file", str(file))
    assert external_urls(args.engines) == []
    file.write_text("# ours\na:1  # the first\n\nb:2\n")
    assert external_urls(args.engines) == ["http://a:1", "http://b:2"]
    file.write_text("b:2\nbroken\n")
    with pytest.raises(UserError, match=r"engines.txt:2: 'broken' is not the address"):
        external_urls(args.engines)


def test_an_external_router_is_not_started() -> None:
    args = parse("--sglang-router-ip", "gate", "--sglang-router-port", "30000")
    assert [process.name for process in make_plan(args).processes] == ["engine-0", "rollout-0", "trainer-0"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rollout-external-engine-addrs", "nowhere"], "'nowhere' is not the address"),
        (["--sglang-router-ip", "gate"], "give both or none"),
        (["--sglang-router-ip", "gate", "--sglang-router-port", "1", "--router-queue-size", "1"], "queue-size:"),
        (["--rollout-external-engine-addrs", "a:1", "--update-weight-mode", "delta"], "can't load changes only"),
        (["--update-weight-transport", "tensor", "--update-weight-mode", "delta"], "leave one of them out"),
    ],
)  # fmt: skip
def test_external_flags_that_make_no_sense_are_refused(flags: list[str], words: str) -> None:
    assert words in refusal(*flags)


def test_a_file_of_models_and_external_engines_exclude_each_other(tmp_path: Path) -> None:
    assert "--sglang-config describes" in refusal(
        *config(tmp_path, ACTOR), "--rollout-external-engine-addrs", "a:1"
    )


def test_the_key_of_external_servers_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "key")
    assert external_token() == "key"
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        external_token()


def test_every_router_flag_is_an_argument_of_the_router() -> None:
    from sglang_router.router_args import RouterArgs

    from rltrain.arguments.engine_names import engine_flags

    names = {flag.replace("-", "_") for flag in engine_flags()["router"]}
    assert names - set(RouterArgs.__dataclass_fields__) == {"prefill", "decode"}


def test_requests_in_flight_follow_the_engines_that_make_samples(tmp_path: Path) -> None:
    few = ["--sglang-server-concurrency", "8"]

    def slots(args: Config) -> int:
        return slot_count(args.engines, args.debug)

    assert slots(parse(*few, "--rollout-num-gpus", "3")) == 24
    assert slots(parse(*few, *config(tmp_path, ACTOR, JUDGE))) == 24
    assert slots(parse(*few, *config(tmp_path, APART))) == 8
    file = tmp_path / "engines.txt"
    args = parse(*few, "--rollout-external-engines-file", str(file))
    assert slots(args) == 8  # nobody yet, who may come
    file.write_text("a:1\nb:2\n")
    assert slots(args) == 16


@pytest.mark.parametrize(
    ("flags", "are_here", "transport"),
    [
        ([], [True, True], "tensor"),
        ([], [True, False], "distributed"),
        (["--actor-num-nodes", "2"], [True, True], "distributed"),  # some trainer ranks are elsewhere
        (["--colocate"], [True, False], "disk"),
        (["--update-weight-mode", "delta"], [True], "distributed"),
        (["--update-weight-transport", "nccl"], [True], "distributed"),
        (["--update-weight-transport", "disk"], [True], "disk"),
        (["--rollout-external-engine-addrs", "node7:30000"], [False], "disk"),
    ],
)
def test_the_transport_of_weights_is_what_the_layout_allows(
    flags: list[str], are_here: list[bool], transport: str
) -> None:
    assert choose(parse(*flags), are_here) == transport


def decide(config: Config, env: dict[str, str]) -> dict[str, str]:
    return nccl_settings(config.engines, config.weights, config.parallel, config.debug, env)


SYMMETRIC, SHARDED = "--sglang-enable-symm-mem", "--sglang-enable-kv-cache-sharding"
DEEPEP = ("--sglang-moe-a2a-backend", "deepep_v2")


@pytest.mark.parametrize(
    ("flags", "env", "value"),
    [
        ([], {}, "0"),
        (["--update-weight-transport", "distributed"], {}, "0"),
        ([SYMMETRIC], {}, "1"),
        ([*DEEPEP], {}, "1"),
        ([SHARDED], {}, "1"),
        ([SHARDED], {"SGLANG_ENABLE_KV_SHARD_ZERO_SM_GATHER": "False"}, "0"),
        ([SHARDED], {"SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "NVLINK"}, "0"),
        ([SHARDED, "--sglang-enable-memory-saver"], {}, "0"),
        ([SHARDED, "--offload-rollout"], {}, "0"),
        ([], {"NCCL_CUMEM_ENABLE": "1"}, "1"),
        ([*DEEPEP, SHARDED], {"NCCL_CUMEM_ENABLE": "0"}, "0"),
        ([SYMMETRIC], {"NCCL_CUMEM_ENABLE": "0"}, "1"),  # SGLang sets it all the same
        (["--colocate"], {}, None),  # nothing goes from one to the other by NCCL
        (["--update-weight-transport", "disk"], {}, None),
        (["--update-weight-transport", "tensor"], {}, None),
        (["--rollout-external-engine-addrs", "node7:30000"], {}, None),
        (["--distributed-backend", "gloo"], {}, None),
    ],
)
def test_nccl_shares_memory_in_the_same_way_in_trainer_and_engines(
    flags: list[str], env: dict[str, str], value: str | None
) -> None:
    decided = decide(parse(*flags), env)
    assert decided == ({} if value is None else {"NCCL_CUMEM_ENABLE": value})


def test_one_trained_engine_decides_how_nccl_shares_memory(tmp_path: Path) -> None:
    symmetric = {"worker_type": "regular", "num_gpus": 1, "overrides": {"enable-symm-mem": True}}
    plain = {"worker_type": "regular", "num_gpus": 1}
    mixed = {"name": "actor", "server_groups": [plain, symmetric]}
    alone = {"name": "actor", "server_groups": [plain]}
    judge = {"name": "judge", "model_path": "/models/judge", "server_groups": [symmetric]}
    assert decide(parse(*config(tmp_path, mixed)), {}) == {"NCCL_CUMEM_ENABLE": "1"}
    assert decide(parse(*config(tmp_path, alone, judge)), {}) == {"NCCL_CUMEM_ENABLE": "0"}


@pytest.mark.parametrize(("index", "value"), [(0, "0"), (3, None)], ids=["trained", "judge"])
def test_an_engine_that_gets_weights_starts_with_what_was_decided(
    index: int, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(tmp_path)
    layout.config.write_text(tomli_w.dumps({"train": arguments.dump(parse(*config(tmp_path, ACTOR, JUDGE)))}))
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "to be put back")
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")

    def dies(*_: object, **__: object) -> None:
        raise ServerDiedError(f"with {os.environ.get('NCCL_CUMEM_ENABLE')}")

    monkeypatch.setattr(HttpServerEngineAdapter, "launch", dies)
    with pytest.raises(ServerDiedError, match=f"with {value}"):
        start_engine(RoleContext(tmp_path, 0, "engine", index, "http://127.0.0.1:1", "token"))


def test_engines_with_several_servers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--sglang-tokenizer-worker-num 2: SGLang serves"):
        parse("--sglang-tokenizer-worker-num", "2")
    several = {"worker_type": "regular", "num_gpus": 1, "overrides": {"tokenizer_worker_num": 3}}
    file = tmp_path / "fleet.json"
    file.write_text(json.dumps({"sglang": [{"name": "actor", "server_groups": [several]}]}))
    with pytest.raises(UserError, match="--sglang-tokenizer-worker-num 3"):
        parse("--sglang-config", str(file))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--actor-num-nodes", "2"],
            "works on one machine only, and --actor-num-nodes is 2: use distributed",
        ),
        (["--update-weight-mode", "delta"], "saves nothing with --update-weight-transport tensor"),
    ],
)
def test_shared_memory_is_refused_where_it_can_not_serve(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse("--update-weight-transport", "tensor", *flags)
