"""Slurm's output becomes data. The texts in `slurm_outputs/` were printed by a real Slurm 22.05 (see `capture.py`)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.slurm import parse, values
from hpc.slurm.client import SlurmClient, SlurmError, SlurmUnavailableError, status_of, without_slurm
from hpc.slurm.cluster import ClusterFacts
from hpc.slurm.nodelist import compress, expand
from hpc.slurm.partitions import parse_config, parse_nodes, parse_partitions
from hpc.slurm.records import JobKey, JobRecord
from hpc.slurm.states import JobState, combined, parse_state
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


class TestStates:
    @pytest.mark.parametrize(
        ("text", "state"),
        [
            ("CANCELLED by 0", JobState.CANCELLED),
            ("RUNNING", JobState.RUNNING),
            ("PD", JobState.PENDING),
            ("OOM", JobState.OUT_OF_MEMORY),
            ("", JobState.UNKNOWN),
            ("A_WORD_OF_TOMORROW", JobState.UNKNOWN),
        ],
    )
    def test_words_of_every_command(self, text: str, state: JobState) -> None:
        assert parse_state(text) is state

    def test_every_state_is_either_alive_or_final(self) -> None:
        final = {state for state in JobState if state.is_final}
        assert final == {
            *map(
                JobState,
                ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"],
            ),
            *map(JobState, ["BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL", "DEADLINE", "REVOKED"]),
        }
        assert {state for state in final if not state.is_failure} == {JobState.COMPLETED}

    def test_interruptions_do_not_blame_the_program(self) -> None:
        assert JobState.PREEMPTED.is_interruption and JobState.NODE_FAIL.is_interruption
        assert not JobState.FAILED.is_interruption and not JobState.OUT_OF_MEMORY.is_interruption
        assert not any(state.is_interruption for state in JobState if not state.is_final)

    @pytest.mark.parametrize(
        ("components", "whole"),
        [
            ("COMPLETED COMPLETED", "COMPLETED"),
            ("COMPLETED FAILED", "FAILED"),
            ("FAILED CANCELLED", "FAILED"),
            ("NODE_FAIL RUNNING", "RUNNING"),
            ("PENDING RUNNING", "RUNNING"),
            ("PENDING COMPLETED", "PENDING"),
            ("PREEMPTED PREEMPTED", "PREEMPTED"),
            ("", "UNKNOWN"),
        ],
    )
    def test_job_is_alive_while_a_component_is(self, components: str, whole: str) -> None:
        assert combined(map(JobState, components.split())) is JobState(whole)

    def test_order_of_components_does_not_matter(self) -> None:
        for one in JobState:
            for other in JobState:
                assert combined([one, other]) is combined([other, one])


class TestNodeList:
    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("n[1-3,7]", "n1 n2 n3 n7"),
            ("n[08-10],gpu7", "n08 n09 n10 gpu7"),
            ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
            ("a-[1-2]-ib,b[3]", "a-1-ib a-2-ib b3"),
            ("login.example.org", "login.example.org"),
            ("None assigned", ""),
            ("(null)", ""),
            ("", ""),
        ],
    )
    def test_expand(self, text: str, names: str) -> None:
        assert expand(text) == names.split()

    @pytest.mark.parametrize(
        "text", ["n[1-3", "n1-3]", "n[3-1]", "n[a-b]", "n[]", "n[[1]]", "a,,b", "n[1-99999][1-99999]", "a b"]
    )
    def test_refuses_what_is_no_list(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"brackets|is not a|is neither|more than"):
            expand(text)

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            ("node3 node1 node2 login", "node[1-3],login"),
            ("n08 n09 n10", "n[08-10]"),
            ("n9 n10 n11", "n[9-11]"),
            ("n1 n01", "n1,n01"),
            ("a1 a1 a1", "a1"),
            ("r1n1 r1n2 r2n1", "r1n[1-2],r2n1"),
        ],
    )
    def test_compress(self, names: str, text: str) -> None:
        assert compress(names.split()) == text

    @given(st.lists(st.from_regex(r"[a-z]{1,2}-?[0-9]{0,3}[a-z]?[0-9]{0,3}", fullmatch=True), min_size=1))
    def test_expand_undoes_compress(self, names: list[str]) -> None:
        expanded = expand(compress(names))
        assert sorted(expanded) == sorted(set(names))


class TestValues:
    def test_seconds_since_1970(self) -> None:
        assert values.parse_time("1795357414") == datetime(2026, 11, 22, 14, 23, 34, tzinfo=UTC)

    def test_local_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import time

        monkeypatch.setenv("TZ", "America/New_York")
        time.tzset()
        try:
            assert values.parse_time("2026-11-22T11:28:17") == datetime(2026, 11, 22, 16, 28, 17, tzinfo=UTC)
        finally:
            monkeypatch.undo()
            time.tzset()

    @pytest.mark.parametrize("text", ["Unknown", "None", "N/A", "", "(null)", "0"])
    def test_no_time(self, text: str) -> None:
        assert values.parse_time(text) is None

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("2-00:00:00", 172_800),
            ("1-02:03:04", 93_784),
            ("01:00:00", 3600),
            ("1:30", 90),
            ("15", 900),
            ("2-12", 216_000),
            ("UNLIMITED", None),
            ("infinite", None),
            ("Partition_Limit", None),
            ("INVALID", None),
        ],
    )
    def test_durations(self, text: str, seconds: float | None) -> None:
        assert values.parse_duration(text) == seconds

    def test_no_duration(self) -> None:
        with pytest.raises(ValueError, match="soon"):
            values.parse_duration("soon")

    @pytest.mark.parametrize(
        ("text", "gpus"),
        [
            ("gpu:h100:4(S:0-1)", {"h100": 4}),
            ("gpu:4", {"": 4}),
            ("gpu:a100:2,gpu:v100:2,shard:8", {"a100": 2, "v100": 2}),
            ("gpu:4090:2", {"4090": 2}),
            ("gpu:h100:2(IDX:0-1)", {"h100": 2}),
            ("gpu:0", {}),
            ("(null)", {}),
            ("nic:2", {}),
        ],
    )
    def test_gpus_of_gres(self, text: str, gpus: dict[str, int]) -> None:
        assert values.gpus_of_gres(text) == gpus

    @pytest.mark.parametrize(
        ("text", "gpus"),
        [
            ("billing=2,cpu=2,gres/gpu:h100=4,gres/gpu=4,mem=2000M", 4),
            ("gres/gpu:h100=4,gres/gpu:a100=2", 6),
            ("cpu=2", 0),
            ("", 0),
        ],
    )
    def test_a_gpu_counts_once(self, text: str, gpus: int) -> None:
        assert values.gpus_of_tres(text) == gpus

    def test_values_may_hold_spaces(self) -> None:
        fields = values.parse_key_values(
            "NodeName=n1 OS=Linux 6.1 #1 SMP @0  State=IDLE+DRAIN Reason=disk is full [root@1]"
        )
        assert fields == {
            "NodeName": "n1",
            "OS": "Linux 6.1 #1 SMP @0",
            "State": "IDLE+DRAIN",
            "Reason": "disk is full [root@1]",
        }

    @given(
        st.builds(JobKey, st.from_regex(r"[0-9]+(_[0-9]+)?", fullmatch=True), st.none() | st.integers(0, 99))
    )
    def test_job_ids_are_read_as_they_are_written(self, key: JobKey) -> None:
        assert JobKey.parse(str(key)) == key
        assert JobKey.parse(f"{key}.batch") == JobKey(key.job, key.component, "batch")


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
