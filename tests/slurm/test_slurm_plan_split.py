"""How nodes are shared out, which processes run where, and what each then knows of its place."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.planning.job_plan import JobPlan, make_slurm_plan
from hpc.planning.nodes import Ask, Split, make_ask, read_cluster_flags, split_nodes
from hpc.slurm.client import SlurmClient, SlurmUnavailableError
from hpc.supervisor import slurm_supervisor
from hpc.supervisor.slurm_supervisor import choose_address
from hpc.supervisor.srun import Allocation, srun_env
from hpc.supervisor.task import task_env
from rltrain.arguments.config import Config
from rltrain.run.errors import UserError


def split(
    nodes: int | None = None, placement: str | None = None, gpus: int = 8, **flags: int | bool
) -> Split:
    given = {name.replace("_", "-"): [] if value is True else [str(value)] for name, value in flags.items()}
    return split_nodes(make_ask(read_cluster_flags(given), nodes, placement), gpus, gpus)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [  # layout, trainer nodes × ranks, rollout nodes × GPUs, engines a node
        ({"nodes": 4}, ("het", 2, 8, 2, 8, 8)),
        ({"nodes": 3}, ("het", 1, 8, 2, 8, 8)),
        ({"nodes": 4, "placement": "plain"}, ("plain", 2, 8, 2, 8, 8)),
        ({}, ("colocated", 1, 8, 1, 8, 8)),
        ({"nodes": 1}, ("colocated", 1, 8, 1, 8, 8)),
        ({"nodes": 2, "colocate": True}, ("colocated", 2, 8, 2, 8, 8)),
        ({"nodes": 4, "rollout_num_gpus": 8}, ("het", 3, 8, 1, 8, 8)),
        ({"nodes": 4, "actor_num_nodes": 1}, ("het", 1, 8, 3, 8, 8)),
        (
            {"actor_num_nodes": 2, "rollout_num_gpus": 16, "rollout_num_gpus_per_engine": 4},
            ("het", 2, 8, 2, 8, 2),
        ),
        ({"rollout_num_gpus": 4, "actor_num_gpus_per_node": 4}, ("colocated", 1, 4, 1, 4, 4)),
        ({"nodes": 2, "gpus": 0}, ("het", 1, 1, 1, 1, 1)),
        ({"nodes": 2, "gpus": 0, "rollout_num_gpus": 3}, ("het", 1, 1, 1, 3, 3)),
        ({"nodes": 2, "rollout_num_gpus_per_engine": 3}, ("het", 1, 8, 1, 6, 2)),
        # engines that span nodes
        ({"nodes": 4, "rollout_num_gpus_per_engine": 16}, ("het", 2, 8, 2, 8, 1)),
        ({"nodes": 4, "rollout_num_gpus_per_engine": 12}, ("het", 2, 8, 2, 6, 1)),
        ({"nodes": 5, "rollout_num_gpus_per_engine": 24}, ("het", 2, 8, 3, 8, 1)),
        ({"nodes": 6, "rollout_num_gpus_per_engine": 16}, ("het", 4, 8, 2, 8, 1)),
        ({"rollout_num_gpus": 32, "rollout_num_gpus_per_engine": 16}, ("het", 1, 8, 4, 8, 1)),
        ({"nodes": 2, "colocate": True, "rollout_num_gpus_per_engine": 16}, ("colocated", 2, 8, 2, 8, 1)),
    ],
)
def test_splits(asked: dict, expected: tuple) -> None:
    s = split(**asked)
    assert (
        s.layout,
        s.trainer_nodes,
        s.trainer_gpus,
        s.rollout_nodes,
        s.rollout_gpus,
        s.engines_per_node,
    ) == expected


def test_trainer_and_engines_have_gpus_of_their_own_where_there_are_enough() -> None:
    s = split(actor_num_gpus_per_node=4, rollout_num_gpus=4)
    assert (s.trainer_gpus, s.first_rollout_gpu) == (4, 4)
    assert split(actor_num_gpus_per_node=4, rollout_num_gpus=4, colocate=True).first_rollout_gpu == 0


def test_a_flag_that_is_taken_back_is_not_given() -> None:
    taken_back = read_cluster_flags({"colocate": None, "debug-train-only": None})
    assert split_nodes(make_ask(taken_back, 4, None), 8, 8).layout == "het"
    assert split(nodes=4, colocate=True).layout == "colocated"


@pytest.mark.parametrize(
    "flags",
    [
        {"debug_train_only": True},
        {"load_debug_rollout_data": "x"},
        {"rollout_num_gpus": 0},
        {"rollout_external_engine_addrs": "host:1"},
        {"rollout_external_engines_file": "engines"},
    ],
)
def test_a_run_without_engines(flags: dict) -> None:
    s = split(4, **flags)
    assert (s.layout, s.nodes, s.rollout_nodes) == ("plain", 4, 0)
    assert "no engines" in s.explain()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nodes": 2, "actor_num_nodes": 2, "rollout_num_gpus": 8}, "nodes of their own: give --nodes 3"),
        ({"nodes": 2, "actor_num_nodes": 2}, "--nodes 3"),
        ({"nodes": 2, "rollout_num_gpus": 16}, "2 nodes.*--nodes 3"),
        ({"nodes": 4, "colocate": True, "actor_num_nodes": 3}, "--nodes 3"),
        ({"nodes": 2, "actor_num_gpus_per_node": 9}, "no node there has more than 8"),
        ({"nodes": 2, "rollout_num_gpus": 7, "rollout_num_gpus_per_engine": 2}, "6 or 8 would be"),
        ({"nodes": 2, "rollout_num_gpus_per_engine": 16}, "engine 16, which takes 2 nodes.*--nodes 3"),
        ({"nodes": 4, "actor_num_nodes": 1, "rollout_num_gpus_per_engine": 16}, "give --nodes 3"),
        ({"nodes": 1, "rollout_num_gpus_per_engine": 16}, "takes 2 nodes.*--nodes 2, or at most .*engine 8"),
        ({"nodes": 2, "colocate": True, "rollout_num_gpus": 24}, "At most --rollout-num-gpus 16"),
        ({"nodes": 2, "colocate": True, "placement": "het"}, "contradicts"),
        ({"nodes": 2, "actor_num_nodes": 0}, "at least 1"),
        ({"nodes": 2, "actor_num_nodes": "two"}, "whole number"),
        ({"num_gpus_per_node": -1}, "num-gpus-per-node is -1: it must be at least 0"),
        ({"rollout_num_gpus": -8}, "rollout-num-gpus is -8: it must be at least 0"),
    ],
)
def test_impossible_asks_name_the_nearest(asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split(**asked)


numbers = st.integers(1, 9)
maybe = st.none() | numbers


def engine_args(gpus: int, size: int, served: Sequence[dict[str, object]] = ()) -> Config:
    """The flags that the engines' places follow from."""
    return Config().replace(
        debug_train_only=False, debug_rollout_only=False,
        rollout_num_gpus=gpus, rollout_num_gpus_per_engine=size, sglang_models=list(served),
        sglang_router_ip=None, hf_checkpoint="model",
    )  # fmt: skip


def plan_of(config: Config, nodes: Split) -> JobPlan:
    return make_slurm_plan(config.engines, config.debug, nodes, "py")


@given(
    ask=st.builds(Ask, maybe, st.none() | st.sampled_from(["het", "plain", "colocated"]), st.booleans(), maybe, maybe,
                  maybe, numbers, st.just(True)),
    gpus=st.integers(0, 8),
)  # fmt: skip
def test_every_split_holds_what_was_asked_for(ask: Ask, gpus: int) -> None:
    try:
        s = split_nodes(ask, gpus, gpus)
    except UserError as error:
        assert len(str(error)) > 30
        return
    assert ask.nodes in (None, s.nodes)
    assert ask.actor_nodes in (None, s.trainer_nodes)
    assert ask.rollout_gpus in (None, s.rollout_num_gpus)
    assert not gpus or max(s.trainer_gpus, s.first_rollout_gpu + s.rollout_gpus) <= gpus
    args = engine_args(s.rollout_num_gpus, ask.engine_size)
    plan = plan_of(args, s)
    taken = Counter()  # GPU by node, of engines
    for process in plan.processes:
        where = process.placement
        assert where is not None and process.count == len(where.nodes) * where.tasks_per_node
        limit = (s.trainer_nodes, s.rollout_nodes)[where.component] if s.layout == "het" else s.nodes
        assert all(0 <= node < limit for node in where.nodes)
        if process.role == "engine":
            assert where.gpus is not None
            first, count = where.gpus
            taken.update((node, gpu) for node in where.nodes for gpu in range(first, first + count))
            assert count * len(where.nodes) == ask.engine_size
            assert not gpus or first + count <= gpus
    assert max(taken.values()) == 1 and len(taken) == s.rollout_num_gpus


def test_without_a_trainer_engines_have_every_node() -> None:
    s = split(nodes=2, gpus=4, rollout_num_gpus_per_engine=2, debug_rollout_only=True)
    args = engine_args(s.rollout_num_gpus, 2)
    args = args.replace(debug_rollout_only=True)
    plan = plan_of(args, s)
    assert plan.roles == ("router+engine+rollout+trainer",)
    assert sum(process.role == "engine" for process in plan.processes) == 4
    (main,) = [process for process in plan.processes if process.role == "trainer"]
    assert main.argv[-1] == "rltrain.rollout_only" and main.count == 1
    assert main.placement is not None and main.placement.gpus is None


def test_plan_of_a_heterogeneous_job() -> None:
    args = engine_args(4, 2)
    plan = plan_of(args, split(nodes=2, gpus=4, rollout_num_gpus_per_engine=2))
    assert plan.roles == ("trainer", "router+engine+rollout")
    by_name = {process.name: process for process in plan.processes}
    assert list(by_name) == ["router-0", "engine-0", "engine-1", "rollout-0", "trainer-[0-3]"]
    assert by_name["engine-1"].placement.gpus == (2, 2)
    assert by_name["trainer-[0-3]"].placement.tasks_per_node == 4
    assert by_name["trainer-[0-3]"].names == ("trainer-0", "trainer-1", "trainer-2", "trainer-3")


def test_plan_of_engines_that_span_nodes() -> None:
    args = engine_args(16, 8)
    s = split(nodes=5, gpus=4, rollout_num_gpus_per_engine=8, rollout_num_gpus=16)
    assert "an engine on every 2" in s.explain()
    by_name = {process.name: process for process in plan_of(args, s).processes}
    assert list(by_name) == ["router-0", "engine-0", "engine-1", "rollout-0", "trainer-[0-3]"]
    engine = by_name["engine-1"]
    assert (engine.placement.nodes, engine.placement.gpus, engine.count) == ((2, 3), (0, 4), 2)
    assert engine.names == ("engine-1", "engine-1.node1") and engine.index_of("engine-1.node1") == 1


def served(name: str, *groups: tuple[str, int, int]) -> dict[str, object]:
    keys = ("worker_type", "num_gpus", "num_gpus_per_engine")
    return {"name": name, "model_path": name, "update_weights": name == "actor",
            "groups": [{**dict(zip(keys, group, strict=True)), "overrides": {}} for group in groups]}  # fmt: skip


def test_plan_of_several_models_with_engines_that_differ() -> None:
    s = split(nodes=3, gpus=4, rollout_num_gpus_per_engine=1, rollout_num_gpus=8)
    kinds = [served("actor", ("regular", 4, 2)), served("judge", ("regular", 1, 1), ("placeholder", 3, 3))]
    by_name = {process.name: process for process in plan_of(engine_args(8, 1, kinds), s).processes}
    assert list(by_name)[:5] == ["router-0", "router-1", "engine-0", "engine-1", "engine-2"]
    places = [by_name[f"engine-{i}"].placement for i in range(3)]
    first = places[0].nodes[0]
    assert [(place.nodes[0] - first, place.gpus) for place in places] == [
        (0, (0, 2)),
        (0, (2, 2)),
        (1, (0, 1)),
    ]


def test_an_engine_that_would_begin_on_one_node_and_end_on_the_next_is_refused() -> None:
    s = split(nodes=3, gpus=4, rollout_num_gpus_per_engine=1, rollout_num_gpus=8)
    kinds = [served("judge", ("regular", 3, 3)), served("actor", ("regular", 2, 2))]
    with pytest.raises(UserError, match="would begin at GPU 3 of a node with 4"):
        plan_of(engine_args(8, 1, kinds), s)


def test_allocation() -> None:
    env = {
        "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-2]", "SLURM_JOB_NODELIST_HET_GROUP_1": "m7",
        "SLURM_GPUS_PER_NODE_HET_GROUP_1": "a100:2", "SLURM_CPUS_PER_TASK_HET_GROUP_0": "8",
    }  # fmt: skip
    assert Allocation.from_env(env) == Allocation((("n1", "n2"), ("m7",)), (None, "a100:2"), (8, None), True)
    plain = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}
    assert Allocation.from_env(plain) == Allocation((("n1", "n2"),), ("4",), (16,), False)


def test_address_that_other_nodes_reach() -> None:
    def allocation(*nodes: str) -> Allocation:
        return Allocation((nodes,), (None,), (None,), False)

    assert choose_address(allocation("n1"), {"SLURMD_NODENAME": "n1"}) == "127.0.0.1"
    # A node that calls itself by a loopback address: the way to the other one tells.
    nodes = allocation("localhost", "127.44.0.2")
    assert choose_address(nodes, {"SLURMD_NODENAME": "localhost"}).startswith("127.")
    # Not by its own loopback name, where it has another.
    assert (
        choose_address(allocation("192.0.2.7", "192.0.2.8"), {"SLURMD_NODENAME": "192.0.2.7"}) == "192.0.2.7"
    )


def test_address_of_a_node_that_dns_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def lookup(name: str, *more: Any, **options: Any) -> Any:  # fake: a server of names may not answer
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(name, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(slurm_supervisor, "_ASK_AGAIN_SECONDS", 0.0)

    class Slurm(SlurmClient):
        address = "NodeAddr=192.0.2.7 "

        silences = 2

        def run(self, *command: str, stdin: str | None = None) -> str:
            self.silences -= 1
            if self.silences >= 0:  # that of names and slurmctld may be gone at the same time
                raise SlurmUnavailableError("it does not answer")
            return f"NodeName={command[-1]} {self.address}NodeHostName=x"

    nodes, env = (
        Allocation((("n1.invalid", "n2.invalid"),), (None,), (None,), False),
        {"SLURMD_NODENAME": "n1.invalid"},
    )
    client = Slurm()
    assert choose_address(nodes, env, client) == "192.0.2.7"
    client.address = "NodeAddr=fd00::7 "
    assert choose_address(nodes, env, client) == "fd00::7"
    client.address = "NodeAddr=fe80::7 "
    with pytest.raises(UserError, match=r"NodeAddr for it \(fe80::7"):
        choose_address(nodes, env, client)
    client.address = ""
    with pytest.raises(UserError, match=r"n1.invalid is not known.*NodeAddr for it \(none\).*IPv4"):
        choose_address(nodes, env, client)


def test_srun_takes_no_flags_from_the_environment() -> None:
    kept = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n1", "SLURM_HET_SIZE": "2", "SLURM_CONF": "/c",
            "PATH": "/bin", "SLURMLIME_TOKEN": "t"}  # fmt: skip
    dropped = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_GPUS_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPU_BIND",
               "SLURM_CPUS_PER_TASK", "SLURM_NTASKS_PER_NODE_HET_GROUP_1", "SLURM_TRES_PER_TASK")  # fmt: skip
    assert srun_env(kept | dict.fromkeys(dropped, "7")) == kept


SPEC = {"role": "trainer", "index": 0, "gpus": [2, 2], "ranks": True, "spans": False}
TASK = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}


def test_a_task_knows_its_rank_and_its_gpus() -> None:
    assert task_env(SPEC, TASK | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == {
        "SLURMLIME_INDEX": "3", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "6,7",
    }  # fmt: skip
    for none in ("", "-1", "NoDevFiles"):
        assert task_env(SPEC, TASK | {"CUDA_VISIBLE_DEVICES": none})["CUDA_VISIBLE_DEVICES"] == ""
    router = {"role": "router", "index": 0, "gpus": None, "ranks": False, "spans": False}
    alone = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert task_env(router, alone | {"CUDA_VISIBLE_DEVICES": "0"}) == {
        "SLURMLIME_INDEX": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert task_env(router, alone) == {"SLURMLIME_INDEX": "0"}
    engine = {"role": "engine", "index": 5, "gpus": [0, 4], "ranks": False, "spans": True}
    assert task_env(engine, {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}) == {
        "SLURMLIME_INDEX": "5", "SLURMLIME_NODE_RANK": "1", "SLURMLIME_NNODES": "2",
    }  # fmt: skip
