"""Sessions of agents and notes of people on the live page and on the report, in a real Chromium."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.analysis_browser import CHROMIUM, Page, browser
from helpers.recorded_runs import steps_run
from test_analysis_report import unpacked

from analysis import load_run
from analysis.live.server import LiveServer
from analysis.pages.html import browse
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table, write_table

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: see requirements/debian.txt")

HOSTILE = "<img src=x onerror='window.hacked=1'>\x1b[31m"
TABS = "[...document.querySelectorAll('.tabs button')].map((button) => button.textContent)"


def turn(
    number: int, parent: int | None, origin: str, began: float, took: float, **more: Any
) -> dict[str, Any]:
    usual = {
        "api": "chat", "prompt_tokens": 400 + 90 * number, "added_tokens": 90, "sampled_tokens": 35, "sample": 0,
        "cached_tokens": 300, "finish": "tool_calls", "tools": ["run_tests"], "forked_from": None,
    }  # fmt: skip
    return {
        "turn": number,
        "parent": parent,
        "origin": origin,
        "began": began,
        "ended": began + took,
        **usual,
        **more,
    }


def session(name: str) -> dict[str, Any]:
    """Five turns: the third forks off beside the second, the fourth begins anew, the last is trained nowhere."""
    turns = [
        turn(0, None, "root", 0.0, 1.25, tools=["read_file", "run_tests"]),
        turn(1, 0, "append", 2.5, 0.75, tools=[HOSTILE]),
        turn(2, 0, "fork", 2.75, 1.5, sample=1, finish="stop", tools=[]),
        turn(3, None, "fork", 5.0, 0.5, forked_from=1, sample=1, finish="stop", tools=[]),
        turn(4, 1, "append", 6.0, 2.0, sample=None, finish="length", tools=[]),
    ]
    events = [{"seconds": 5.0, "kind": "rewritten", "message": f"earlier turns differ {HOSTILE}"}]
    return {"id": name, "seconds": 8.0, "turns": turns, "events": events}


def write_agents_run(root: Path) -> Path:
    """A run of an agent: three steps of four sessions, with two samples each; the second group of a step has none."""
    run = steps_run(root, [{"step": step, "rollout/reward": 0.25 * step} for step in range(3)])
    for step in range(3):
        samples = [
            Sample(
                index=8 * step + i, group_index=2 * step + i // 4, rollout_id=4 * step + i // 2 if i < 4 else None,
                prompt=[{"role": "user", "content": "Mend the function until its test passes."}],
                response=f"The bound was wrong, so I changed it. ({step}, {i})", tokens=[1, 2, 3, 4],
                response_length=3, loss_mask=[1, 0, 1], rollout_log_probs=[-0.5, 0.0, -1.5],
                status=Sample.Status.COMPLETED, label="passes",
                metadata={"agent_session": session(f"s{step}{i}"), "task": "bounds"} if i in (0, 2) else {},
            )
            for i in range(8)
        ]  # fmt: skip
        rewards = [0.25 * (i % 4) for i in range(8)]
        write_table(
            samples_to_table(samples, step=step, attempt=0, dataset="train", rewards=rewards),
            RunLayout(run).step_dir(step, 0),
        )
    return run


def make_notes(run_dir: Path) -> None:
    run = load_run(run_dir)
    run.note(0, f"stops before the test has run {HOSTILE}", tags=["early stop", HOSTILE])
    run.note(9, "a fine chain of turns", tags=["good"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serves one run of an agent, with two notes."""
    runs = tmp_path_factory.mktemp("runs")
    make_notes(write_agents_run(runs / "agents"))
    with LiveServer(runs) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def page(server: LiveServer) -> Iterator[Page]:
    """It has the server's cookie already: the page that gives it to a user draws charts, which takes seconds."""
    with browser() as opened:
        opened.call("Network.setCookie", name=server.cookie, value=server.token, url=server.url)
        yield opened


def open_samples(page: Page, server: LiveServer, fragment: str, width: int = 1400) -> None:
    page.open(f"http://127.0.0.1:{server.server_port}/runs/agents/samples#{fragment}", width)


def test_notes_are_the_same_blocks_on_both_pages(server: LiveServer) -> None:
    live = server.live.run("agents")[1]
    content = browse(load_run(server.live.runs_dir / "agents")).content
    for block in ("notes", "index", "texts-0"):
        assert json.loads(json.dumps(live.block(block))) == unpacked(content, block)
    newest, oldest = live.block("notes")
    assert (newest["sample"], newest["tags"], newest["step"], newest["index"]) == (9, ["good"], 1, 9)
    assert oldest["sample"] == 0 and "<img" in oldest["text"]


def test_a_note_that_is_made_now_is_shown(tmp_path: Path) -> None:
    run_dir = write_agents_run(tmp_path / "agents")
    with LiveServer(tmp_path) as server:
        assert server.live.run("agents")[1].block("notes") == []
        load_run(run_dir).note(3, "new")
        (note,) = server.live.run("agents")[1].block("notes")
        assert (note["text"], note["sample"]) == ("new", 3)


def test_a_note_on_a_sample_that_is_not_in_the_page(tmp_path: Path) -> None:
    run_dir = write_agents_run(tmp_path / "agents")
    make_notes(run_dir)
    notes = unpacked(browse(load_run(run_dir), max_samples=4).content, "notes")
    assert [note["sample"] for note in notes] == [None, 0]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_a_session_is_a_tree_of_turns(server: LiveServer, page: Page, width: int) -> None:
    open_samples(page, server, "sample=0&tab=session", width)
    assert page.evaluate(TABS) == ["conversation", "tokens", "group", "session"]
    items = page.evaluate("[...document.querySelectorAll('.turns li')].map((item) => item.textContent)")
    assert [item.split("90 tokens")[0] for item in items] == [
        "turn 0rootread_filerun_teststhis sample",
        "turn 1append<img src=x onerror='window.hacked=1'>U+001B[31mthis sample",
        "turn 4appendnot trained on",
        "turn 2forksample 1",
        "turn 3fork of 1sample 1",
    ]
    assert "90 tokens added, 35 sampled, 2.00 s, length" in items[2]
    indents = "[...document.querySelectorAll('.turns li')].map((item) => item.style.marginLeft)"
    assert page.evaluate(indents) == ["0px", "18px", "18px", "18px", "0px"]
    assert "earlier turns differ" in page.evaluate("document.querySelector('#detail .finding').textContent")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelector('.turns button').click()")  # to the other sample of the session
    page.wait(
        "selected === 1 && document.querySelector('.turns li:last-child').textContent.includes('this sample')"
    )
    page.evaluate("select(4)")  # of no session: what is shown instead is the first tab
    page.wait(f"{TABS}.length === 3 && document.querySelector('.tabs .on').textContent === 'conversation'")
    assert page.evaluate("window.hacked") is None and page.errors == []


@needs_chromium
@pytest.mark.slow
def test_an_open_page_shows_a_note_that_is_made_now(server: LiveServer, page: Page) -> None:
    open_samples(page, server, "sample=20")
    path = server.live.runs_dir / "agents" / "notes.jsonl"
    before = path.read_text()
    load_run(server.live.runs_dir / "agents").note(20, "seen just now")
    page.wait("document.querySelector('#detail .note') !== null")
    assert "seen just now" in page.evaluate("$('top').textContent")
    path.write_text(before)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_notes_lead_to_their_samples_and_are_found(server: LiveServer, page: Page, width: int) -> None:
    open_samples(page, server, "sample=5", width)
    assert page.evaluate("$('detail').textContent").startswith("step 0")  # it is there when the page is ready
    assert "Notes (2)" in page.evaluate("$('top').textContent")
    assert page.evaluate("document.querySelectorAll('#rows .noted').length") == 2
    page.evaluate("document.querySelector('#top .note button').click()")
    page.wait("selected === 9 && document.querySelector('#detail .note') !== null")
    assert "a fine chain of turns" in page.evaluate("document.querySelector('#detail .note').textContent")
    page.type("search", "early stop")
    page.wait("visible.length === 1 && visible[0] === 0")
    page.evaluate("$('search').value = 'run_tests'; apply()")
    page.wait("visible.length === 6")  # both sessions of each step
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None and page.errors == []
