"""The doctor's checks, each with something that is wrong and something that is fine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc.doctor.check import Check
from hpc.doctor.machine import check_address, check_open_files, check_ports, check_threads
from hpc.doctor.partition import check_interruptions, check_partition, gpu_memory_gib, partition_memory
from hpc.doctor.probe import judge, read_answers
from hpc.doctor.requirements import (
    check_compiler,
    check_gpu_software,
    check_packages,
    check_python,
    check_transformer_engine,
)
from hpc.doctor.storage import check_shared, check_storage, check_tracking
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.partitions import parse_nodes, parse_partitions
from hpc.submitting.run_dir import filesystem_type
from rltrain.arguments.groups.debug import Tracking
from rltrain.packages import check_trainer, driver_problem, problem_with
from rltrain.run.errors import UserError

MOUNTS = """\
/dev/vda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
fs01:/home /home nfs4 rw 0 0
/dev/sdb /home/anna/local\\040disk xfs rw 0 0
tmpfs /mem tmpfs rw 0 0
/dev/sdc /over ext4 rw 0 0
x@tcp:/y /over lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("requirement", "version", "problem"),
    [
        ("torch==2.13.0", "2.13.0+cpu", None),
        ("torch==2.13.0", "2.9.1", "torch 2.9.1 is installed, ==2.13.0 is needed"),
        ("pandas>=2.2", "2.2", None),
        ("pandas>=2.2", "2.10.0", None),
        ("pandas>=2.2", "1.5.3", "pandas 1.5.3 is installed, >=2.2 is needed"),
        ("x>=1,<2", "2.0.0", "x 2.0.0 is installed, <2,>=1 is needed"),
        ("x~=1.4", "1.9", None),
        ("x~=1.4", "2.0", "x 2.0 is installed, ~=1.4 is needed"),
        ("safetensors; extra == 'train'", "0.5", None),
        ("wandb==0.31.0; extra == 'train'", None, "wandb is not installed, ==0.31.0 is needed"),
    ],
)
def test_requirements(requirement: str, version: str | None, problem: str | None) -> None:
    assert problem_with(requirement, lambda name: version) == problem


def test_packages_of_this_environment() -> None:
    assert [check.level for check in check_packages(need_training=True)] == ["ok", "ok"]
    assert check_python().level == "ok"
    assert check_python((3, 9, 2)).level == "fail"


@pytest.fixture
def torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake environment: two requirements, of which torch is not installed."""
    declared = ["rich>=13", "torch>=2.13; extra == 'train'", "sglang==9; extra == 'gpu'", "x; extra == 'dev'"]
    monkeypatch.setattr("rltrain.packages.metadata.requires", lambda name: declared)
    versions = {"rich": "13", "sglang": "8", "torch": None}
    monkeypatch.setattr("rltrain.packages.installed_version", versions.__getitem__)
    monkeypatch.setattr("rltrain.packages.torch_cuda", lambda: None)


def test_missing_training_packages_matter_where_the_job_runs(torch_is_missing: None) -> None:
    here, on_nodes = check_packages(need_training=True), check_packages(need_training=False)
    assert [check.level for check in here] == ["ok", "fail"]
    assert here[1].message == "torch is not installed, >=2.13 is needed; sglang 8 is installed, ==9 is needed"
    assert here[1].advice == "in a checkout: make setup"
    assert [check.level for check in on_nodes] == ["ok", "warn"]


def test_the_trainer_starts_with_packages_that_fit(
    torch_is_missing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rltrain.packages.torch_cuda", lambda: (13, 0))
    with pytest.raises(UserError) as caught:
        check_trainer()
    assert str(caught.value) == (
        "torch is not installed, >=2.13 is needed. In a checkout of slurmlime:"
        " pip install -c requirements/gpu.txt '.[train,gpu]'"
    )


def test_the_trainer_does_not_start_on_a_gpu_that_torch_can_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trainer()
    monkeypatch.setattr("rltrain.packages.torch_cuda", lambda: (13, 0))
    monkeypatch.setattr("rltrain.packages.driver_cuda", lambda: (12, 8))
    with pytest.raises(
        UserError, match=r"torch is built for CUDA 13.0, but this node's driver supports CUDA 12.8"
    ):
        check_trainer()


@pytest.mark.parametrize(
    ("built_for", "driver", "fits"),
    [
        ((13, 0), (13, 0), True), ((13, 2), (13, 0), True), ((12, 8), (13, 0), True), ((13, 0), None, True),
        (None, (12, 8), True), ((13, 0), (12, 9), False),
    ],
)  # fmt: skip
def test_driver(built_for: tuple[int, int] | None, driver: tuple[int, int] | None, fits: bool) -> None:
    assert (driver_problem(built_for, driver) is None) == fits


def test_software_of_a_gpu_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gpu_software(0) == []
    monkeypatch.setattr("rltrain.packages.torch_cuda", lambda: (13, 0))
    monkeypatch.setattr("rltrain.packages.driver_cuda", lambda: (13, 1))
    driver, _, engine = check_gpu_software(1)
    assert (driver.level, driver.message) == ("ok", "of CUDA 13.1; torch is built for 13.0")
    assert engine.level == "warn" and "attention, norms and experts are slower" in engine.message
    assert check_transformer_engine("2.20.2").level == "ok"
    monkeypatch.setattr("rltrain.packages.driver_cuda", lambda: (12, 8))
    assert check_gpu_software(1)[0].level == "fail"
    monkeypatch.setattr("rltrain.packages.torch_cuda", lambda: None)
    assert check_gpu_software(1)[0].message == "torch is built for CPUs"


def test_nvcc_is_looked_for_where_engines_do(tmp_path: Path) -> None:
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/nvcc").touch(mode=0o755)
    env = {"PATH": str(tmp_path / "path/bin")}
    assert check_compiler(env) == Check("nvcc", "ok", str(tmp_path / "path/bin/nvcc"))
    assert check_compiler(env | {"CUDA_HOME": str(tmp_path / "home")}).message == str(
        tmp_path / "home/bin/nvcc"
    )
    assert check_compiler(env | {"CUDA_PATH": str(tmp_path / "none")}).level == "warn"


def test_what_torch_is_built_for_is_read_without_importing_it() -> None:
    code = "import sys; from rltrain.packages import torch_cuda; print(torch_cuda()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import torch

    expected = None if torch.version.cuda is None else tuple(map(int, torch.version.cuda.split(".")))
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/root", "ext4"), ("/tmp/x", "tmpfs"), ("/home/anna/runs", "nfs4"), ("/home/anna/local disk/runs", "xfs"),
        ("/homes/x", "ext4"), ("/over/x", "lustre"),
    ],
)  # fmt: skip
def test_file_system_of_a_path(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind


@pytest.mark.parametrize(
    ("path", "level"),
    [
        ("/home/anna", "ok"), ("/over/x", "ok"), ("/data", "warn"), ("/home/anna/local disk/x", "warn"),
        ("/tmp/runs", "fail"), ("/dev/shm/runs", "fail"), ("/mem/x", "fail"),
    ],
)  # fmt: skip
def test_shared_directory(path: str, level: str) -> None:
    assert check_shared(Path(path), MOUNTS).level == level


def test_run_directory(tmp_path: Path) -> None:
    [check] = check_storage(tmp_path / "not" / "yet", others=False)
    assert check.level in ("ok", "warn") and str(tmp_path) in check.message
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    assert check_storage(tmp_path, others=False, needed=1e18)[0].level == "fail"
    [check] = check_storage(Path("/proc/self"), others=False)
    assert check.level == "fail" and "can't be written" in check.message


@pytest.mark.parametrize(
    ("omp", "cores", "processes", "level"),
    [
        (None, 2, 2, "ok"),
        ("1", 2, 2, "ok"),
        ("64", 2, 2, "warn"),
        ("many", 2, 2, "fail"),
        ("0", 2, 2, "fail"),
    ],
)
def test_threads(omp: str | None, cores: int, processes: int, level: str) -> None:
    assert check_threads(omp, cores, processes).level == level


def test_advice_on_threads_can_be_followed() -> None:
    assert "OMP_NUM_THREADS=4:" in check_threads("64", 16, 4).advice
    assert "OMP_NUM_THREADS=1:" in check_threads("64", 2, 8).advice


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_ports("127.0.0.1").level == "ok"
    assert check_ports("203.0.113.1").level == "fail"  # an address that is not ours
    assert check_open_files(1024).level == "warn" and check_open_files(65536).level == "ok"
    assert check_address([]).level == "warn"
    assert check_address(["127.0.1.1"]).level == "warn"
    assert check_address(["10.0.0.7"]).level == "ok"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib99")
    assert check_address(["10.0.0.7"]).level == "fail"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^lo,docker0")
    assert check_address(["10.0.0.7"]).level == "ok"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert check_address(["10.0.0.7"]).level == "ok"


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("h100", 80), ("a100", 40), ("nvidia_a100-sxm4-80gb", 80), ("NVIDIA-H200", 141), ("a100_3g.20gb", 20),
        ("teslax", None), ("", None),
    ],
)  # fmt: skip
def test_gpu_memory_by_its_type(kind: str, size: int | None) -> None:
    assert gpu_memory_gib(kind) == size


def node(name: str, partition: str, gres: str, state: str = "IDLE") -> str:
    return (
        f"NodeName={name} CPUTot=64 RealMemory=512000 Gres={gres} State={state} Partitions={partition}"
        f" CPUAlloc=0 AllocMem=0 NodeAddr={name}\n"
    )


def facts(**fields: object) -> ClusterFacts:
    partitions = (
        "PartitionName=gpu Nodes=g[1-3] State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=1-00:00:00\n"
        "PartitionName=high Nodes=g[1-3] State=UP PriorityTier=9 PreemptMode=OFF MaxTime=UNLIMITED\n"
        "PartitionName=cpu Nodes=c1 State=UP PriorityTier=1 PreemptMode=OFF MaxTime=UNLIMITED\n"
        "PartitionName=old Nodes=g1 State=DRAIN PriorityTier=1 PreemptMode=OFF MaxTime=UNLIMITED\n"
    )
    nodes = "".join(node(f"g{i}", "gpu,high", "gpu:h100:8") for i in (1, 2)) + node(
        "g3", "gpu", "gpu:h100:8", "DOWN"
    )
    known = {
        "name": "big", "version": "22.05", "partitions": tuple(parse_partitions(partitions)),
        "nodes": tuple(parse_nodes(nodes + node("c1", "cpu", "(null)"))), "preempt_type": "preempt/partition_prio",
        "job_requeue": True, "kill_wait_s": 30.0, "has_accounting": True, "accounts": None,
    }  # fmt: skip
    return ClusterFacts(**{**known, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "level", "said"),
    [
        ("gpu", 2, 8, "ok", "2 × (8 h100, 64 CPUs, 500 GiB), 2 idle; time limit 24 h"),
        ("gpu", 3, 8, "fail", "at most --nodes 2"),
        ("gpu", 1, 16, "fail", "needs 1 nodes with 16 GPUs"),
        ("cpu", 1, 8, "ok", "no GPU"),  # ranks are processes there
        ("gpux", 1, 1, "fail", "Did you mean gpu?"),
        ("old", 1, 1, "fail", "DRAIN"),
    ],
)
def test_partition(name: str, nodes: int, gpus: int, level: str, said: str) -> None:
    check = check_partition(facts(), name, nodes, gpus, None)[0]
    assert check.level == level
    assert said in f"{check.message} {check.advice}"


def test_preemption() -> None:
    assert "after 60 s of grace" in check_interruptions(facts(), "gpu").message
    assert "not preempted" in check_interruptions(facts(), "high").message
    cancels = parse_partitions(
        "PartitionName=gpu Nodes=g1 State=UP PriorityTier=1 PreemptMode=CANCEL\n"
        "PartitionName=high Nodes=g1 State=UP PriorityTier=9 PreemptMode=OFF\n"
    )
    check = check_interruptions(facts(partitions=tuple(cancels)), "gpu")
    assert check.level == "warn" and "--chain" in check.advice


def test_memory_of_a_partition() -> None:
    memory = partition_memory(facts(), "gpu", None)
    assert memory and memory.gpu and memory.size == 80 * 1024**3
    memory = partition_memory(facts(), "cpu", None)
    assert memory and not memory.gpu and memory.size == 512000 * 1024**2
    unknown = facts(nodes=tuple(parse_nodes(node("g1", "gpu", "gpu:8"))))
    assert partition_memory(unknown, "gpu", None) is None


def answer(host: str, **fields: object) -> dict:
    packages = {"torch": "2.13.0", "sglang": "0.5.23"}
    known = {
        "host": host,
        "sees_mark": True,
        "packages": packages,
        "driver": None,
        "addresses": ["10.0.0.1"],
        "gpus": 0,
        "cores": 64,
    }
    return {**known, **fields}


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def test_what_nodes_say() -> None:
    here = {"torch": "2.13.0", "sglang": "0.5.23"}
    fine = judge([answer("n1"), answer("n2")], 2, "/home/x", here)
    assert set(levels(fine).values()) == {"ok"}
    assert levels(judge([answer("n1")], 2, "/home/x", here)) == {"nodes": "fail"}
    blind = judge([answer("n1"), answer("n2", sees_mark=False)], 2, "/home/x", here)
    assert levels(blind)["shared directory"] == "fail" and "n2 can't see /home/x" in blind[0].message
    assert "n1" not in blind[0].message
    old = judge([answer("n1", packages={"torch": "2.9.0", "sglang": None})], 1, "/home/x", here)
    assert levels(old)["packages on nodes"] == "warn"
    assert "n1 has torch 2.9.0, this machine 2.13.0; n1 has sglang not at all" in old[1].message
    # a login node without torch says nothing about the nodes' version
    assert levels(judge([answer("n1")], 1, "/home/x", {"torch": None}))["packages on nodes"] == "ok"
    outdated = judge([answer("n1", driver="torch is built for CUDA 13.0, but …")], 1, "/home/x", here)
    assert levels(outdated)["driver of nodes"] == "fail"
    lonely = judge([answer("n1", addresses=["127.0.0.1"])], 1, "/home/x", here)
    assert levels(lonely)["network of nodes"] == "fail"


def test_answers_among_other_output() -> None:
    text = 'Welcome to n1!\nSLURMLIME_PROBE {"host": "n1"}\nsrun: done\nSLURMLIME_PROBE {"host": "n2"}\n'
    assert [each["host"] for each in read_answers(text)] == ["n1", "n2"]


def test_wandb_key(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"

    def level(env: dict[str, str], **fields: object) -> str:
        return check_tracking(Tracking(**{"use_wandb": True, **fields}), env, netrc).level

    assert level({}) == "fail"
    assert level({}, use_wandb=False) == level({}, wandb_mode="offline") == "ok"
    assert level({"WANDB_API_KEY": "x"}) == level({"WANDB_MODE": "offline"}) == "ok"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    netrc.chmod(0o644)
    assert level({}) == "warn"
    netrc.chmod(0o600)
    assert level({}) == "ok"
    assert level({"WANDB_BASE_URL": "https://wandb.example.org"}) == "fail"
