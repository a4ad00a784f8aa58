"""Slurm's words for states, lists of nodes, times and resources become values, whichever command printed them."""

from __future__ import annotations

import string
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.slurm import values
from hpc.slurm.nodelist import compress, expand
from hpc.slurm.records import JobKey
from hpc.slurm.states import JobState, combined, parse_state

# [a-z]{1,2}-?[0-9]{0,3}[a-z]?[0-9]{0,3}: drawn in parts, which is quicker than from the expression.
LETTER, NOTHING = st.sampled_from(string.ascii_lowercase), st.just("")
DIGITS = NOTHING | st.one_of(
    st.sampled_from([f"{number:0{width}}" for number in range(10**width)]) for width in (1, 2, 3)
)
NAMES = st.tuples(LETTER, NOTHING | LETTER, NOTHING | st.just("-"), DIGITS, NOTHING | LETTER, DIGITS).map(
    "".join
)


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

    @given(st.lists(NAMES, min_size=1))
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
