"""The live page: what its server gives to whom, and what a real Chromium makes of it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.analysis_browser import CHROMIUM, Page, browser
from test_analysis_report import unpacked

from analysis import load_run
from analysis.live.board import run_row
from analysis.live.server import LiveServer
from analysis.pages.html import browse
from analysis.serve import main
from rltrain.run.layout import RunLayout

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: see requirements/debian.txt")


@contextmanager
def serving(recorded_runs: Path, runs: Path) -> Iterator[LiveServer]:
    """Serves copies of the demo's runs, so that a test may let them grow."""
    shutil.copytree(recorded_runs, runs)
    with LiveServer(runs) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture
def server(recorded_runs: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with serving(recorded_runs, tmp_path / "runs") as started:
        yield started


@pytest.fixture(scope="module")
def site(recorded_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One for all tests with a browser, which compiles Plotly once: two seconds for each address.

    A test lets only a run of its own grow: `own_run`.
    """
    with serving(recorded_runs, tmp_path_factory.mktemp("site") / "runs") as started:
        yield started


def ask(server: LiveServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def get(server: LiveServer, path: str) -> Any:
    status, _, body = ask(server, path, Cookie=f"{server.cookie}={server.token}")
    assert status == 200, body
    return json.loads(body)


def test_nothing_is_answered_without_the_token(server: LiveServer) -> None:
    paths = [
        "/",
        "/live.js",
        "/plotly.js",
        "/api/runs",
        "/runs/baseline/samples",
        "/runs/baseline/blocks/index",
    ]
    for path in [*paths, "/?token=guess"]:
        status, headers, body = ask(server, path)
        assert status == 401 and b"python -m analysis.serve" in body and "Set-Cookie" not in headers
    assert ask(server, "/api/runs", Cookie=f"{server.cookie}=guess")[0] == 401


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(server: LiveServer) -> None:
    status, headers, _ = ask(server, f"/?token={server.token}")
    assert status == 303 and headers["Location"] == "/"
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and str(server.server_port) in cookie


def test_a_page_of_another_name_gets_nothing(server: LiveServer) -> None:
    cookie = f"{server.cookie}={server.token}"
    assert ask(server, "/api/runs", Cookie=cookie, Host="evil.example:80")[0] == 403
    assert ask(server, "/api/runs", Cookie=cookie, Host="localhost:9999")[0] == 200  # a tunnel's other end


def test_only_runs_and_own_files_are_served(server: LiveServer) -> None:
    cookie = f"{server.cookie}={server.token}"
    odd = [
        "/runs/nobody/events",
        "/runs/..%2f..%2fetc/samples",
        "/passwd",
        "/server.py",
        "/runs/baseline/blocks/texts-9999",
    ]
    odd += [
        "/runs/baseline/blocks/meta-1",
        "/api/lines?run=nobody&metric=x",
        "/api/lines?run=baseline&axis=moon",
    ]
    assert [ask(server, path, Cookie=cookie)[0] for path in odd] == [404] * len(odd)


def test_the_overview_says_how_each_run_stands(server: LiveServer) -> None:
    rows = {row["name"]: row for row in get(server, "/api/runs")["runs"]}
    frame = load_run(server.live.runs_dir / "baseline")
    assert set(rows) == {path.name for path in server.live.runs_dir.iterdir()}
    row = rows["baseline"]
    assert row["step"] == row["num_rollout"] == int(frame.steps["step"].max()) + 1
    assert row["reward"] == frame.steps["rollout/reward"].iloc[-1] and row["attempts"] == 2
    assert (row["state"], rows["crashed"]["state"], row["eta"]) == ("finished", "failed", None)


def test_lines_are_the_frames_numbers_along_each_axis(server: LiveServer) -> None:
    run = load_run(server.live.runs_dir / "baseline")
    for axis in ("step", "tokens", "gpu_hours"):
        got = get(
            server, f"/api/lines?run=baseline&run=fast&metric=rollout/reward&metric=nothing&axis={axis}"
        )
        line = got["lines"]["baseline"]["rollout/reward"]
        assert line["y"] == run.steps["rollout/reward"].tolist() and line["x"] == sorted(line["x"])
        assert "rollout/reward" in got["metrics"] and "nothing" not in got["lines"]["baseline"]
    assert got["restarts"]["fast"] == [] and len(got["restarts"]["baseline"]) == 1


def test_a_run_that_trains_is_followed(server: LiveServer) -> None:
    before = get(server, "/api/lines?run=baseline&metric=rollout/reward")["lines"]["baseline"][
        "rollout/reward"
    ]
    row = {
        "step": before["x"][-1] + 1,
        "attempt": 1,
        "time": 2e9,
        "rollout/reward": 0.625,
        "perf/step_s": 3.0,
    }
    with (server.live.runs_dir / "baseline" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + '\n{"step": 99, "atte')  # and the next line is being written
    after = get(server, "/api/lines?run=baseline&metric=rollout/reward")["lines"]["baseline"][
        "rollout/reward"
    ]
    assert after["x"] == [*before["x"], row["step"]] and after["y"][-1] == 0.625


def test_samples_are_those_of_the_report(server: LiveServer) -> None:
    """The page of a server and the file are drawn from the same blocks."""
    content = browse(load_run(server.live.runs_dir / "baseline")).content
    for block in ("index", "texts-0", "tokens-0", "texts-1"):
        assert get(server, f"/runs/baseline/blocks/{block}") == unpacked(content, block)
    whole, used = get(server, "/runs/baseline/blocks/vocabulary"), unpacked(content, "vocabulary")
    assert used.items() <= whole.items()
    meta, wanted = get(server, "/runs/baseline/blocks/meta"), unpacked(content, "meta")
    assert (meta["findings"], meta["total"]) == (wanted["findings"], wanted["total"])


def test_an_open_page_keeps_its_samples_while_the_run_gets_more(server: LiveServer) -> None:
    layout = RunLayout(server.live.runs_dir / "baseline")
    meta = get(server, "/runs/baseline/blocks/meta")
    last = meta["total"] // 64  # its evaluation samples, which are behind those of training
    index, texts = (get(server, f"/runs/baseline/blocks/{name}") for name in ("index", f"texts-{last}"))
    step = layout.steps()[-1]
    shutil.copytree(layout.step_dir(step, 1), layout.step_dir(step + 1, 1))
    with layout.metrics.open("a") as file:
        file.write(json.dumps({"step": step + 1, "attempt": 1, "time": 2e9}) + "\n")
    now = get(server, "/runs/baseline/blocks/index")
    assert len(now["step"]) > len(index["step"])
    assert get(server, f"/runs/baseline/blocks/texts-{last}") != texts
    assert get(server, f"/runs/baseline/blocks/texts-{last}?mark={meta['mark']}") == texts
    assert get(server, f"/runs/baseline/blocks/index?mark={meta['mark']}") == index
    status, _, said = ask(
        server, "/runs/baseline/blocks/index?mark=x", Cookie=f"{server.cookie}={server.token}"
    )
    assert status == 404 and b"load it again" in said


def test_an_empty_directory_has_no_runs_yet(tmp_path: Path) -> None:
    with LiveServer(tmp_path) as server:
        assert server.live.board()["runs"] == []
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "run.json").write_text("{}")
        (row,) = server.live.board()["runs"]
        assert (row["name"], row["state"], row["step"], row["reward"]) == ("new", "submitted", 0, None)


def test_a_run_that_goes_on_to_more_steps_is_not_finished(tmp_path: Path) -> None:
    run = tmp_path / "longer"
    run.mkdir()
    (run / "finished.json").write_text('{"steps": 2, "attempt": 0}')
    (run / "status.json").write_text('{"phase": "training"}')
    (run / "config.toml").write_text("[train]\nnum_rollout = 2\n")
    assert run_row(run)["state"] == "finished"
    (run / "config.toml").write_text("[train]\nnum_rollout = 4\n")
    assert (run_row(run)["state"], run_row(run)["step"]) == ("training", 2)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert main([str(tmp_path), "--port", "70000"]) == 2
    assert "--port 70000 can't be used" in capsys.readouterr().err


def test_the_command_says_where_the_page_is_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "analysis.serve", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
                          env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:  # fmt: skip
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert "http://127.0.0.1:" in said[0] and "?token=" in said[0]
    assert said[1].startswith("from your own computer, first: ssh -L ") and "token" not in said[1]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Page) -> Page:
    """The module's one page, empty and without complaints of an earlier test."""
    chromium.leave()
    return chromium


@pytest.fixture
def own_run(site: LiveServer, page: Page, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run of this test alone: a copy of `baseline` under the given name, removed when no page asks for it."""
    run = site.live.runs_dir / request.param
    try:
        yield shutil.copytree(site.live.runs_dir / "baseline", run)
        page.leave()
    finally:
        shutil.rmtree(run)


def address(site: LiveServer, fragment: str = "") -> str:
    return f"http://127.0.0.1:{site.server_port}/#{fragment}"


def look(page: Page, *, dark: bool = False) -> None:
    feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    page.call("Emulation.setEmulatedMedia", features=[feature])


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_every_view_fits(site: LiveServer, page: Page, width: int, dark: bool) -> None:
    look(page, dark=dark)
    page.open(site.url, width)
    assert "token" not in page.evaluate("location.href")
    for tab in ("charts", "samples", "events"):
        page.open(address(site, f"run=baseline&run=hacked&tab={tab}"), width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(f"!document.getElementById('{tab}').hidden")
        if tab == "samples":
            assert page.evaluate("document.querySelector('iframe').offsetHeight") > 600
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is not dark
    assert page.errors == []


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("own_run", ["grows"], indirect=True)
def test_charts_overlay_runs_and_follow_them(site: LiveServer, page: Page, own_run: Path) -> None:
    page.open(site.url)
    page.open(address(site, "run=grows&run=fast&metric=rollout%2Freward&tab=charts"))
    traces = "document.querySelector('.plot').data"
    assert page.evaluate(f"{traces}.map((trace) => trace.name)") == ["grows", "fast"]
    count = page.evaluate(f"{traces}[0].x.length")
    row = {"step": count, "attempt": 1, "time": 2e9, "rollout/reward": 0.5}
    with (own_run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    page.wait(f"{traces}[0].x.length === {count + 1}")
    page.evaluate("$('metric').value = 'train/loss'; $('metric').dispatchEvent(new Event('change'))")
    page.wait("document.querySelectorAll('.plot').length === 2")
    assert "metric=train%2Floss" in page.evaluate("location.hash")
    assert page.errors == []


@needs_chromium
@pytest.mark.slow
def test_the_keyboard_is_enough(site: LiveServer, page: Page) -> None:
    page.open(site.url)
    page.open(address(site, "run=baseline&tab=charts"))
    page.evaluate("$('tab-charts').focus()")
    page.evaluate(
        "$('tab-charts').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))"
    )
    page.wait("!$('samples').hidden")
    assert page.evaluate("document.activeElement.id") == "tab-samples"
    assert page.evaluate("$('tab-samples').getAttribute('aria-selected')") == "true"
    page.wait("document.querySelector('iframe').contentDocument.body.dataset.ready === 'yes'")
    inside = "document.querySelector('iframe').contentDocument"
    assert page.evaluate(f"{inside}.querySelectorAll('#rows .row').length") > 3


@needs_chromium
@pytest.mark.slow
def test_a_finding_shows_its_samples(site: LiveServer, page: Page) -> None:
    page.open(site.url)
    page.open(f"http://127.0.0.1:{site.server_port}/runs/hacked/samples")
    finding = {
        "severity": "note",
        "name": "a",
        "evidence": "b",
        "advice": "c",
        "samples": "from=1&sort=-reward",
    }
    page.evaluate(f"meta.findings = [{json.dumps(finding)}]; drawTop()")
    page.evaluate("document.querySelector('.finding button').click()")
    page.wait("sortKey === 'reward' && descending")
    shown = page.evaluate("visible.slice(0, 5).map((i) => index.step[i])")
    assert len(shown) == 5 and min(shown) >= 1


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("own_run", ["<img src=x onerror='window.hacked=1'>"], indirect=True, ids=["img"])
def test_names_and_texts_of_runs_are_never_markup(site: LiveServer, page: Page, own_run: Path) -> None:
    said = {"time": 2e9, "kind": "<b onclick=1>", "attempt": 0, "reason": own_run.name}
    with (own_run / "events.jsonl").open("a") as file:
        file.write(json.dumps(said) + "\n")
    page.open(site.url)
    for tab in ("charts", "events"):
        page.evaluate(
            f"state.runs = [rows.find((row) => row.name.includes('img')).name, 'fast']; state.tab = '{tab}'; drawView()"
        )
        page.wait("document.querySelector('.plot, .event') !== null")
    assert (
        page.evaluate("window.hacked") is None and page.evaluate("document.querySelector('main img')") is None
    )
