"""Which process sees which GPU: on one machine, in a step of Slurm, and in a rank that Slurm has bound."""

from __future__ import annotations

import pytest

from hpc.gpus import Gpu, select_gpus
from hpc.planning.job_plan import make_plan
from hpc.supervisor.srun import _INPUTS
from hpc.supervisor.task import task_env
from rltrain import arguments
from rltrain.arguments.config import Config
from rltrain.run.errors import UserError

MIB = 1024**2
TABLE = "0, GPU-aaaa-1, 81559\n1, GPU-bbbb-2, 81559\n2, GPU-cccc-3, 40960\n3, GPU-dddd-4, 40960\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1", "2", "3"]),
        ("2,0", ["2", "0"]),
        ("GPU-bbbb", ["GPU-bbbb"]),
        ("0,9,1", ["0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_visible_gpus(visible: str | None, names: list[str]) -> None:
    assert [gpu.name for gpu in select_gpus(TABLE, visible)] == names


def test_memory_of_gpus() -> None:
    assert select_gpus(TABLE, "GPU-cccc,0") == [Gpu("GPU-cccc", 40960 * MIB), Gpu("0", 81559 * MIB)]
    assert select_gpus(TABLE, "MIG-7") == [Gpu("MIG-7", 40960 * MIB)]
    assert select_gpus("No devices were found\n", None) == []


def seen(*gpus: str, **changes: object) -> dict[str, str]:
    config = Config().replace(**{"hf_checkpoint": "model", "rollout_num_gpus": 2, **changes})
    return {
        each.name: each.env["CUDA_VISIBLE_DEVICES"] for each in make_plan(config, "py", gpus=gpus).processes
    }


def test_each_process_of_a_local_job_sees_its_own_gpus() -> None:
    assert seen("4", "5", "6", "7", actor_num_gpus_per_node=2) == {
        "router-0": "", "rollout-0": "", "trainer-0": "4,5", "trainer-1": "4,5", "engine-0": "6", "engine-1": "7",
    }  # fmt: skip
    two = seen("0", "1", "2", rollout_num_gpus_per_engine=2)
    assert (two["trainer-0"], two["engine-0"]) == ("0", "1,2")


def test_colocated_processes_share_gpus() -> None:
    shared = seen("0", "1", actor_num_gpus_per_node=2, colocate=True)
    assert (shared["trainer-1"], shared["engine-0"], shared["engine-1"]) == ("0,1", "0", "1")


def test_modes_without_a_trainer_or_engines() -> None:
    assert seen("0", "1", debug_rollout_only=True)["engine-1"] == "1"
    assert seen("0", debug_train_only=True) == {"rollout-0": "", "trainer-0": "0"}


def test_too_few_gpus_are_refused_before_anything_starts() -> None:
    with pytest.raises(
        UserError, match=r"has 2 usable GPUs \(0,3\), and the run takes 3: 1 for trainer ranks"
    ):
        seen("0", "3")


def test_colocated_engines_take_all_gpus_of_the_trainer() -> None:
    """As in slime, and as on Slurm: 8 ranks with engines of two make four engines."""
    argv = ["--hf-checkpoint", "m", "--prompt-data", "p", "--num-rollout", "1", "--rollout-batch-size", "8"]
    argv += ["--rm-type", "math", "--colocate", "--actor-num-gpus-per-node", "8"]
    assert arguments.parse([*argv, "--rollout-num-gpus-per-engine", "2"]).engines.rollout_num_gpus == 8
    assert arguments.parse([*argv, "--rollout-num-gpus-per-engine", "3"]).engines.rollout_num_gpus == 6
    assert arguments.parse([*argv, "--rollout-num-gpus", "2"]).engines.rollout_num_gpus == 2


RANKS = {"role": "trainer", "index": 0, "gpus": [0, 4], "ranks": True, "spans": False}
RANK_3 = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}


def test_a_rank_that_slurm_has_bound_to_a_gpu_keeps_it() -> None:
    assert task_env(RANKS, RANK_3 | {"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_task_that_is_shown_fewer_gpus_than_planned_does_not_start() -> None:
    engine = {"role": "engine", "index": 1, "gpus": [4, 2], "ranks": False, "spans": False}
    alone = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.raises(ValueError, match=r"GPUs 4 to 5 of the node, but Slurm shows it 2 .*gpu-bind"):
        task_env(engine, alone)
    with pytest.raises(ValueError, match="but Slurm shows it 2"):
        task_env(RANKS, RANK_3 | {"CUDA_VISIBLE_DEVICES": "0,1"})


@pytest.mark.parametrize("name", ["SLURM_GPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND_TYPE"])
def test_the_jobs_binding_of_gpus_does_not_reach_its_steps(name: str) -> None:
    assert _INPUTS.fullmatch(name)
