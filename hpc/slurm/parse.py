"""Parse the output of sacct, squeue, scontrol and sinfo into frozen dataclasses. Pure: `client.py` runs the commands.

The options to ask with stand beside the parsers. Fields are separated by a control character, because job names,
comments and paths may hold any other.
"""

from __future__ import annotations

from typing import Any

from hpc.slurm import values
from hpc.slurm.nodelist import expand
from hpc.slurm.records import JobDetail, JobKey, JobRecord, NodeState
from hpc.slurm.states import JobState, parse_state

DELIMITER = "\x1f"

SACCT_COLUMNS = (
    *("JobID", "JobIDRaw", "JobName", "User", "Account", "Partition", "QOS", "State", "Reason", "ExitCode"),
    *(
        "Submit",
        "Eligible",
        "Start",
        "End",
        "ElapsedRaw",
        "Timelimit",
        "NNodes",
        "NodeList",
        "AllocTRES",
        "WorkDir",
    ),
    "DBIndex",
)
# squeue has one letter for each; the same order as SACCT_COLUMNS as far as both know the column.
SQUEUE_COLUMNS = {
    "JobID": "%i",
    "JobIDRaw": "%A",
    "JobName": "%j",
    "User": "%u",
    "Account": "%a",
    "Partition": "%P",
    "QOS": "%q",
    "State": "%T",
    "Reason": "%r",
    "Submit": "%V",
    "Start": "%S",
    "End": "%e",
    "Elapsed": "%M",
    "Timelimit": "%l",
    "NNodes": "%D",
    "NodeList": "%N",
    "WorkDir": "%Z",
}
SINFO_COLUMNS = {"Node": "%N", "State": "%T", "Reason": "%E"}
SACCT_OPTIONS = ("-n", "-P", f"--delimiter={DELIMITER}", f"--format={','.join(SACCT_COLUMNS)}")
SQUEUE_OPTIONS = ("-h", "-r", "--states=all", "-o", DELIMITER.join(SQUEUE_COLUMNS.values()))
SINFO_OPTIONS = ("-h", "-N", "-o", DELIMITER.join(SINFO_COLUMNS.values()))


def parse_sacct(text: str) -> list[JobRecord]:
    """Output of `sacct` with SACCT_OPTIONS; steps are left out."""
    rows = _rows(text, SACCT_COLUMNS)
    return [_sacct_record(row) for row in rows if JobKey.parse(row["JobID"]).step is None]


def parse_squeue(text: str) -> list[JobRecord]:
    """Output of `squeue` with SQUEUE_OPTIONS."""
    return [_squeue_record(row) for row in _rows(text, tuple(SQUEUE_COLUMNS))]


def parse_job_details(text: str) -> list[JobDetail]:
    """Output of `scontrol show job -o`: a line a component."""
    return [_job_detail(values.parse_key_values(line)) for line in text.splitlines() if "JobId=" in line]


def parse_sinfo(text: str) -> list[NodeState]:
    """Output of `sinfo` with SINFO_OPTIONS, which has a line for each partition that a node is in."""
    states = {
        row["Node"]: NodeState(row["Node"], row["State"].lower(), values.text_or_none(row["Reason"]))
        for row in _rows(text, tuple(SINFO_COLUMNS))
    }
    return list(states.values())


def _rows(text: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    # Not splitlines(): the delimiter is a line's end to it.
    lines = [line for line in text.split("\n") if line.strip()]
    return [dict(zip(columns, line.split(DELIMITER), strict=True)) for line in lines]


def _sacct_record(row: dict[str, str]) -> JobRecord:
    code = values.parse_exit_code(row["ExitCode"])
    state = parse_state(row["State"])
    common = _common(row, state)
    if not state.is_waiting:  # sacct goes on showing why it once waited
        common.update(reason=None)
    return JobRecord(
        **common,
        exit_code=code[0] if code and state.is_final else None,
        signal=code[1] if code and state.is_final else None,
        eligible=values.parse_time(row["Eligible"]),
        expected_start=None,
        elapsed_s=float(row["ElapsedRaw"] or 0),
        gpus=values.gpus_of_tres(row["AllocTRES"]) if common["nodes"] else 0,
        db_index=int(row["DBIndex"]),
    )


def _squeue_record(row: dict[str, str]) -> JobRecord:
    state = parse_state(row["State"])
    common = _common(row, state)
    return JobRecord(
        **common,
        exit_code=None,
        signal=None,
        eligible=None,
        expected_start=values.parse_time(row["Start"]) if state.is_waiting else None,
        elapsed_s=values.parse_duration(row["Elapsed"]) or 0.0,
        gpus=None,
        db_index=None,
    )


def _common(row: dict[str, str], state: JobState) -> dict[str, Any]:
    """The fields that sacct and squeue both have."""
    nodes = tuple(expand(row["NodeList"]))
    return {
        "key": JobKey.parse(row["JobID"]),
        "raw_id": int(row["JobIDRaw"]),
        "name": row["JobName"],
        "user": row["User"],
        "account": values.text_or_none(row["Account"]) or "",
        "partition": row["Partition"],
        "qos": values.text_or_none(row["QOS"]) or "",
        "state": state,
        "reason": values.text_or_none(row["Reason"]),
        "submitted": values.parse_time(row["Submit"]),
        # squeue gives a waiting job's expected start here, and one that was cancelled in the queue its end
        "started": values.parse_time(row["Start"]) if nodes else None,
        "ended": values.parse_time(row["End"]) if state.is_final else None,
        "time_limit_s": values.parse_duration(row["Timelimit"]),
        "num_nodes": int(row["NNodes"] or 0),
        "nodes": nodes,
        "work_dir": row["WorkDir"],
    }


def _job_detail(fields: dict[str, str]) -> JobDetail:
    code = values.parse_exit_code(fields.get("ExitCode", ""))
    raw_id = int(fields["JobId"])
    return JobDetail(
        key=_detail_key(fields),
        raw_id=raw_id,
        state=parse_state(fields["JobState"]),
        reason=values.text_or_none(fields.get("Reason", "")),
        restarts=int(fields.get("Restarts", 0)),
        requeue=fields.get("Requeue") == "1",
        exit_code=code[0] if code else None,
        signal=code[1] if code else None,
        preempted=values.parse_time(fields.get("PreemptTime", "")),
        started=values.parse_time(fields.get("StartTime", "")),
        ends=values.parse_time(fields.get("EndTime", "")),
        nodes=tuple(expand(fields.get("NodeList", ""))),
        fields=fields,
    )


def _detail_key(fields: dict[str, str]) -> JobKey:
    if "HetJobId" in fields:
        return JobKey(fields["HetJobId"], int(fields["HetJobOffset"]))
    if "ArrayJobId" in fields:
        return JobKey(f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}")
    return JobKey(fields["JobId"])
