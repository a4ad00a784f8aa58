"""Slurm's output becomes data. The texts in `slurm_outputs/` were printed by a real Slurm 22.05 (see `capture.py`)."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path

import pytest

from hpc.slurm import parse
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError, status_of, without_slurm
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.partitions import parse_config, parse_nodes, parse_partitions
from hpc.slurm.records import JobRecord
from hpc.slurm.states import JobState
from rltrain.run.errors import UserError

OUTPUTS = Path(__file__).parents[1] / "slurm_outputs"


def output(name: str) -> str:
    return (OUTPUTS / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def sacct() -> list[JobRecord]:
    return parse.parse_sacct(output("sacct"))


@pytest.fixture(scope="module")
def squeue() -> list[JobRecord]:
    return parse.parse_squeue(output("squeue"))


@pytest.fixture(scope="module")
def facts() -> ClusterFacts:
    return ClusterFacts(
        name="sandbox",
        version="22.05.8",
        partitions=tuple(parse_partitions(output("scontrol_show_partition"))),
        nodes=tuple(parse_nodes(output("scontrol_show_node"))),
        preempt_type=parse_config(output("scontrol_show_config"))["PreemptType"],
        job_requeue=True,
        kill_wait_s=2.0,
        has_accounting=True,
        accounts=None,
    )


def of(records: list[JobRecord], key: str) -> list[JobRecord]:
    return [record for record in records if str(record.key) == key]


class TestJobs:
    def test_sacct_has_every_attempt_of_every_component(self, sacct: list[JobRecord]) -> None:
        states = [(str(record.key), record.state.value) for record in sacct if record.key.job == "7"]
        assert sorted(states) == [
            *[("7+0", "COMPLETED"), ("7+0", "PREEMPTED")],
            *[("7+1", "COMPLETED"), ("7+1", "PREEMPTED")],
        ]
        [first, second] = sorted(of(sacct, "7+1"), key=lambda record: record.db_index or 0)
        assert first.raw_id == second.raw_id == 8
        assert first.nodes == ("node4", "node5") and first.num_nodes == 2 and first.gpus == 8
        assert (
            first.started
            and first.ended
            and first.elapsed_s == (first.ended - first.started).total_seconds() > 0
        )
        assert second.submitted == first.ended and second.eligible and second.eligible > second.submitted

    @pytest.mark.parametrize(
        ("job", "state", "exit_code", "signal"),
        [
            ("1", "TIMEOUT", 0, 0),
            ("2", "COMPLETED", 0, 0),
            ("3", "FAILED", 3, 0),
            ("4", "FAILED", 0, 9),
            ("5", "CANCELLED", 0, 0),
            ("10", "PREEMPTED", 0, 0),
            ("12", "NODE_FAIL", 0, 0),
            ("22", "RUNNING", None, None),
        ],
    )
    def test_ends(
        self, sacct: list[JobRecord], job: str, state: str, exit_code: int | None, signal: int | None
    ) -> None:
        [record] = of(sacct, job)
        assert (record.state, record.exit_code, record.signal) == (JobState(state), exit_code, signal)
        assert (record.ended is None) == (state == "RUNNING")

    def test_requeued_job_waits_with_nothing_in_hand(self, sacct: list[JobRecord]) -> None:
        [failed, waiting] = of(sacct, "13")
        assert (failed.state, waiting.state) == (JobState.NODE_FAIL, JobState.PENDING)
        assert (
            waiting.started is None
            and waiting.nodes == ()
            and waiting.gpus == 0
            and waiting.reason == "BeginTime"
        )

    def test_job_cancelled_in_the_queue_never_started(
        self, sacct: list[JobRecord], squeue: list[JobRecord]
    ) -> None:
        for [record] in (of(sacct, "6"), of(squeue, "6")):
            assert record.state is JobState.CANCELLED and record.started is None and record.nodes == ()

    def test_any_job_name(self, sacct: list[JobRecord], squeue: list[JobRecord]) -> None:
        assert of(squeue, "2")[0].name == 'it\'s | 100% "odd" JobState=FAILED'
        assert of(sacct, "2")[0].name == "it's | 100% `odd` JobState=FAILED"  # as Slurm stores it
        [detail] = [detail for detail in details() if detail.raw_id == 2]
        assert detail.state is JobState.COMPLETED

    def test_steps_are_no_jobs(self) -> None:
        assert "7+0.batch" in output("sacct_steps")
        assert {str(record.key) for record in parse.parse_sacct(output("sacct_steps"))} == {"2", "7+0", "7+1"}

    def test_arrays(self, sacct: list[JobRecord], squeue: list[JobRecord]) -> None:
        assert {record.key.job for record in sacct if record.raw_id in (15, 16)} == {"15_1", "15_3"}
        assert {record.key.job for record in squeue if record.raw_id == 21} == {"21_1", "21_2"}

    def test_squeue_knows_what_a_job_waits_for(self, squeue: list[JobRecord]) -> None:
        [record] = of(squeue, "23")
        assert record.state is JobState.PENDING and record.reason == "Resources"
        assert record.expected_start and record.submitted and record.expected_start > record.submitted
        assert record.started is None and record.ended is None

    def test_squeue_and_sacct_agree(self, sacct: list[JobRecord], squeue: list[JobRecord]) -> None:
        compared = 0
        for record in squeue:
            newest = max(of(sacct, str(record.key)), key=lambda same: same.db_index or 0, default=None)
            if newest is None or record.state.is_waiting:
                continue
            for field in ("raw_id", "user", "account", "partition", "state", "started", "ended", "nodes"):
                assert getattr(record, field) == getattr(newest, field), (str(record.key), field)
            compared += 1
        assert compared > 10

    def test_status_of_a_heterogeneous_job(self, squeue: list[JobRecord]) -> None:
        status = status_of("18", squeue)
        assert status.state is JobState.RUNNING
        assert [record.nodes for record in status.components] == [("node1",), ("node4", "node5")]
        assert status_of("999", squeue).state is JobState.UNKNOWN

    def test_controller_tells_preemption_and_restarts(self) -> None:
        by_key = {str(detail.key): detail for detail in details()}
        assert (by_key["7+0"].restarts, by_key["18+0"].restarts) == (1, 0)
        graced = by_key["22"]
        assert (
            graced.state is JobState.RUNNING
            and graced.preempted
            and graced.ends
            and graced.ends > graced.preempted
        )
        assert by_key["18+1"].preempted is None
        assert (by_key["12"].requeue, by_key["13"].requeue) == (False, True)
        assert by_key["15_1"].raw_id == 16

    def test_times_are_in_a_time_zone(self, sacct: list[JobRecord]) -> None:
        assert all(record.submitted and record.submitted.tzinfo is UTC for record in sacct)


def details() -> list[parse.JobDetail]:
    return parse.parse_job_details(output("scontrol_show_job"))


class TestCluster:
    def test_partitions(self, facts: ClusterFacts) -> None:
        gpu, graced = facts.partition("gpu"), facts.partition("lowgrace")
        assert facts.default_partition is gpu
        assert gpu.nodes == tuple(f"node{i}" for i in range(1, 7))
        assert (gpu.max_time_s, gpu.default_time_s, gpu.max_nodes) == (172_800, 3600, None)
        assert (graced.max_time_s, graced.preempt_mode, graced.grace_s, graced.priority_tier) == (
            None,
            "REQUEUE",
            10,
            1,
        )

    def test_who_can_be_preempted(self, facts: ClusterFacts) -> None:
        modes = {partition.name: facts.preemption(partition.name) for partition in facts.partitions}
        expected = {
            "gpu": "OFF",
            "low": "REQUEUE",
            "lowgrace": "REQUEUE",
            "lowcancel": "CANCEL",
            "high": "OFF",
        }
        assert modes == {**expected, "cpu": "OFF"}

    def test_shapes_leave_out_what_is_down_or_drained(self, facts: ClusterFacts) -> None:
        by_type = {shape.gpus: shape for shape in facts.shapes("gpu")}
        h100, a100 = by_type[(("h100", 4),)], by_type[(("a100", 4),)]
        assert (h100.count, a100.count) == (2, 2)  # node3 is drained, node6 has no power
        assert (h100.idle, a100.idle) == (0, 0)
        assert (h100.cpus, h100.memory_mb, h100.features) == (16, 64_000, ("h100",))
        assert facts.gpu_types("gpu") == ["a100", "h100"] and facts.gpu_types("cpu") == []
        assert facts.nodes_with("gpu", gpus=4) == 4 and facts.nodes_with("gpu", gpus=5) == 0
        assert facts.nodes_with("gpu", gpus=1, gpu_type="a100") == 2

    def test_unusable_nodes_say_why(self, facts: ClusterFacts) -> None:
        reasons = {node.name: node.reason for node in facts.nodes if not node.is_usable}
        assert set(reasons) == {"node3", "node6"}
        assert (reasons["node3"] or "").startswith("disk is full") and (reasons["node6"] or "").startswith(
            "power_off"
        )
        states = {node.name: node for node in parse.parse_sinfo(output("sinfo"))}
        assert states["node3"].state == "drained" and states["node3"].reason == "disk is full"
        assert len(states) == 7

    def test_gpus_in_use(self, facts: ClusterFacts) -> None:
        used = {node.name: node.gpus_used for node in facts.nodes}
        assert used["node1"] == {"h100": 2} and used["node4"] == {"a100": 4} and used["cpu1"] == {}

    def test_unknown_partition_names_the_nearest(self, facts: ClusterFacts) -> None:
        with pytest.raises(UserError, match=r"no partition 'gpus'\. Did you mean gpu\?"):
            facts.partition("gpus")

    def test_config(self) -> None:
        config = parse_config(output("scontrol_show_config"))
        assert config["SLURM_VERSION"] == "22.05.8" and config["KillWait"] == "2 sec"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
            SlurmUnavailableError,
        ),
        ("sacct: error: Problem talking to the database: Connection refused", SlurmUnavailableError),
        ("slurm_requeue error: Connection reset by peer", SlurmUnavailableError),
        ("sbatch: error: Batch job submission failed: Invalid account", SlurmError),
    ],
)
def test_an_outage_is_told_from_a_refusal(tmp_path: Path, said: str, kind: type[SlurmError]) -> None:
    command = tmp_path / "squeue"
    command.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    command.chmod(0o755)
    with pytest.raises(SlurmError) as error:
        SlurmClient({"PATH": f"{tmp_path}:/bin"}).squeue()
    assert type(error.value) is kind and said in str(error.value)


def test_environment_of_commands() -> None:
    env = {
        "SLURM_CONF": "/x",
        "SLURM_CPU_BIND": "none",
        "SBATCH_PARTITION": "gpu",
        "SLURM_JOB_ID": "3",
        "PATH": "/bin",
    }
    assert without_slurm(env) == {"SLURM_CONF": "/x", "PATH": "/bin"}
