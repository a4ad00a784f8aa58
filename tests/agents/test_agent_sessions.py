"""Sessions of agents: a row each, their turns, and the tree; in the notebook, the export and the report page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.recorded_runs import steps_run

from analysis import export, load_run
from analysis.frames.sessions import record_of
from analysis.pages.data import texts_of
from analysis.reading.errors import NotInRunError
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, write_table


def turn(number: int, parent: int | None, origin: str, began: float, **more: Any) -> dict[str, Any]:
    """A turn that takes half a second, adds 10 tokens and samples 4."""
    usual = {
        "api": "chat", "ended": began + 0.5, "prompt_tokens": 10 * (number + 1), "added_tokens": 10,
        "sampled_tokens": 4, "cached_tokens": 10 * number, "finish": "stop", "tools": [], "forked_from": None,
        "sample": 0,
    }  # fmt: skip
    return {"turn": number, "parent": parent, "origin": origin, "began": began, **usual, **more}


RECORD = {
    "id": "abc",
    "seconds": 4.0,
    "turns": [
        turn(0, None, "root", 0.0, finish="tool_calls", tools=["add", "find"]),
        turn(1, 0, "append", 1.5),  # a second after the first
        turn(2, 0, "fork", 1.6, sample=1),  # while the one before is under way
        turn(3, None, "fork", 2.35, forked_from=1, sample=2),
    ],
    "events": [{"seconds": 1.0, "kind": "rewritten", "message": "earlier turns differ"}],
    "events_left_out": 0,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = steps_run(tmp_path / "run", [{"step": 0}])
    samples = [
        Sample(
            index=i, group_index=i // 2, rollout_id=0, prompt="p", response="r", tokens=[1, 2, 3], response_length=1,
            rollout_log_probs=[-0.5], status=Sample.Status.COMPLETED,
            metadata={"agent_session": RECORD} if i == 0 else {"task": "x"},
        )
        for i in range(3)
    ]  # fmt: skip
    table = samples_to_table(samples, step=0, attempt=0, dataset="train", rewards=[1.0, 0.0, 0.5])
    write_table(table, RunLayout(run).step_dir(0, 0))
    return run


def test_a_session_is_a_row_with_what_it_took(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(run_dir)
    (row,) = run.sessions.to_dict("records")
    expected = {
        "session": "abc", "outcome": "completed", "reward": 1.0, "samples": 3, "turns": 4, "forks": 2, "tool_calls": 2,
        "seconds": 4.0, "prompt_tokens": 10, "sampled_tokens": 16, "added_tokens": 30, "cached_share": 0.6,
        "events": "rewritten", "rollout_id": 0, "step": 0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["tool_seconds"] == pytest.approx(1.0 + 0.25) and row["generation_seconds"] == pytest.approx(
        1.6
    )
    assert run.turns("abc")["waited"].tolist() == pytest.approx([0.0, 1.0, 0.0, 0.25])
    assert export.main([str(run_dir), "--frame", "sessions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["session"] == "abc"
    with pytest.raises(NotInRunError, match="no session 'xyz'"):
        run.turns("xyz")


def test_the_tree_shows_forks_tools_and_samples_also_on_the_page(run_dir: Path) -> None:
    run = load_run(run_dir)
    tree = run.session_tree("abc")
    assert tree.splitlines() == [
        "session abc: 4 turns in 4.0 s",
        "└ 0 root: +10 tokens, 4 sampled, tool_calls, calls add, find, 0.50 s [sample 0]",
        "  └ 1 append: +10 tokens, 4 sampled, stop, 0.50 s after 1.00 s [sample 0]",
        "  └ 2 fork: +10 tokens, 4 sampled, stop, 0.50 s [sample 1]",
        "└ 3 fork of 1: +10 tokens, 4 sampled, stop, 0.50 s after 0.25 s [sample 2]",
        "! 1.0 s rewritten: earlier turns differ",
    ]
    rows = run.read_samples("all")
    shown = texts_of(rows.iloc[0], None)
    assert shown["session"]["turns"] == [
        [0, 0, "root", None, 10, 4, "tool_calls", ["add", "find"], 0.0, 0.5, 0],
        [1, 1, "append", None, 10, 4, "stop", [], 1.5, 0.5, 0],
        [2, 1, "fork", None, 10, 4, "stop", [], 1.6, 0.5, 1],
        [3, 0, "fork", 1, 10, 4, "stop", [], 2.35, 0.5, 2],
    ]
    assert shown["session"]["events"] == [[1.0, "rewritten", "earlier turns differ"]] and shown["extra"] == []
    shown = texts_of(rows.iloc[1], None)
    assert (shown["session"], shown["extra"]) == (None, [["metadata", '{"task": "x"}']])


def test_a_run_without_agents_has_no_sessions(synthetic_run: RunLayout) -> None:
    assert load_run(synthetic_run.root).sessions.empty
    for metadata in (
        None,
        "",
        '{"agent_session": 5}',
        "agent_session",
        json.dumps({"agent_session": {}}),
        json.dumps({"agent_session": {"turns": [{"turn": 0}]}}),
    ):
        assert record_of(metadata) is None
