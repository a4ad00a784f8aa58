"""The pages of analysis.report: what is in the file, and what a real Chromium makes of it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.analysis_browser import CHROMIUM, Page, browser

from analysis import load_run, report
from analysis.pages import data
from analysis.pages.data import choose
from analysis.pages.html import _packed, browse
from rltrain.run.layout import RunLayout
from rltrain.sample import Sample
from rltrain.schema import samples_to_table

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: see requirements/debian.txt")

TABS = ["conversation", "tokens", "group"]
SHOW_TAB = "[...document.querySelectorAll('.tabs button')].find((b) => b.textContent === '{}').click()"

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'><svg onload=window.hacked=4>",
    "\u202eright to left\u202c \u2066isolated\u2069 \u200bnothing\u200b",
    "']}\"); window.hacked = 5; //",
    "<!--<script> ]]> &lt;b&gt; ${window.hacked = 6} $title $$ `",
    "\x00\x1b[31m\x07\x85\u2028",
    "long " + "a" * 1_000_000,
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every text wants to break out of the page."""
    layout = RunLayout(tmp_path_factory.mktemp("hostile") / "<script>window.hacked=7<!--")
    samples = [
        Sample(group_index=i, index=i, prompt=[{"role": text[:60], "content": text}], response=text, label=text,
               tokens=[1, 2], response_length=1, rollout_log_probs=[-1.0], loss_mask=[1], weight_versions=[text[:60]],
               status=Sample.Status.FAILED, failure=text[:200], metadata={text[:60]: text[:200]})
        for i, text in enumerate(HOSTILE)
    ]  # fmt: skip
    table = samples_to_table(samples, step=0, attempt=0, dataset="train", rewards=[0.0] * len(samples))
    layout.step_dir(0, 0).mkdir(parents=True)
    pq.write_table(table, layout.step_dir(0, 0) / "part-0.parquet")
    vocabulary = {HOSTILE[0]: 1, HOSTILE[1]: 2}
    (layout.root / "tokenizer").mkdir()
    (layout.root / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return layout.root


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


def unpacked(content: str, block: str) -> Any:
    match = re.search(rf'id="{block}">([^<]*)</script>', content)
    assert match
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def test_the_page_holds_what_the_frames_hold(recorded_runs: Path) -> None:
    run = load_run(recorded_runs / "baseline")
    content = browse(run).content
    index = unpacked(content, "index")
    assert len(index["step"]) == len(run.samples) + len(run.evals)
    assert index["reward"][: len(run.samples)] == run.samples["reward"].tolist()
    row = run.read_samples("all", steps=0).iloc[3]
    text, tokens = unpacked(content, "texts-0")[3], unpacked(content, "tokens-0")[3]
    assert "".join(said for _, said, _ in text["messages"][2:]) == row["response"]
    assert tokens["ids"] == list(row["tokens"])
    assert tokens["engine"] == pytest.approx(list(row["rollout_log_probs"]), abs=1e-4)
    assert not re.search(r"(src|href)=.?https?:", content)  # nothing is loaded from anywhere


def test_no_text_reaches_the_markup(hostile: Path) -> None:
    content = browse(load_run(hostile)).content
    assert "window.hacked" not in content.replace("&lt;script&gt;window.hacked=7", "")
    assert content.count("</script>") == content.count("<script")


def test_lone_surrogates_survive_packing() -> None:
    packed = _packed({"text": "\ud800 \udfff"})
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == {"text": "\ud800 \udfff"}


def test_too_many_samples_are_thinned_by_whole_groups(recorded_runs: Path) -> None:
    samples = load_run(recorded_runs / "fast").samples
    chosen = choose(samples, 100)
    assert 80 <= len(chosen) <= 100
    assert (chosen.groupby("group_index").size() == 8).all()
    assert chosen["step"].min() == 0
    assert chosen["step"].max() == 11
    assert choose(samples, 10**6) is samples


@pytest.mark.slow
def test_command_line(recorded_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(recorded_runs / "fast"), "-o", str(tmp_path / "page.html")]) == 0
    assert "data:image/png;base64," in (tmp_path / "page.html").read_text()
    assert report.main([str(recorded_runs / "nothing")]) == 2
    assert "Runs nearby" in capsys.readouterr().err


def test_runs_without_samples_have_a_page(tmp_path: Path) -> None:
    RunLayout(tmp_path).config.write_text("")
    assert unpacked(browse(load_run(tmp_path)).content, "index")["step"] == []


@needs_chromium
@pytest.mark.slow
def test_a_browser_opens_filters_and_sorts(recorded_runs: Path, tmp_path: Path, page: Page) -> None:
    run = load_run(recorded_runs / "baseline")
    page.open(browse(run).save(tmp_path / "page.html").as_uri())
    total = len(run.samples) + len(run.evals)
    count = "document.getElementById('count').textContent"
    first = "document.querySelector('#rows .row').textContent"
    assert page.evaluate(count).startswith(f"{total} of {total}".replace(str(total), f"{total:,}"))
    assert page.evaluate("document.querySelectorAll('#rows .row').length") < 60  # only those in sight
    page.evaluate("document.querySelector('[data-key=reward]').click()")
    page.wait(f"{first}.includes('completed')")
    assert page.evaluate("index.reward[visible[0]]") == 1
    page.evaluate("document.querySelector('[data-key=reward]').click()")
    page.wait("index.reward[visible[0]] === 0")

    texts = run.read_samples("text")["response"].tolist() + run.read_evals("text")["response"].tolist()
    expected = sum("calculator" in text for text in texts)
    page.type("search", "calculator")
    page.wait(f"{count}.startsWith('{expected} of')")
    page.evaluate("document.querySelector('#rows .row').click()")
    page.wait("document.querySelectorAll('.message.tool').length === 1")
    page.evaluate(SHOW_TAB.format("tokens"))
    page.wait("document.querySelector('.tokens .masked')")
    shown = page.evaluate("index.index[selected]"), page.evaluate("index.dataset[selected]")
    row = load_run(recorded_runs / "baseline").samples.set_index(["index", "dataset"]).loc[shown]
    values = run.tokens(int(shown[0])).query("mask == 1")
    facts = page.evaluate("[...document.querySelectorAll('.legend + .kv span')].map((e) => e.textContent)")
    means = {text.rpartition(" ")[0]: float(text.rpartition(" ")[2].replace("−", "-")) for text in facts}
    assert shown[1] == "train"
    assert means["mean log-prob"] == pytest.approx(values["log_prob_engine"].mean(), rel=0.01)
    assert means["mean entropy"] == pytest.approx(values["entropy"].mean(), rel=0.01)
    page.evaluate("""document.querySelector('.tokens .t:not(.masked)').dispatchEvent(
        new MouseEvent('mousemove', {bubbles: true, clientX: 9, clientY: 9}))""")
    tip = page.evaluate("document.getElementById('tip').textContent").replace("−", "-")
    first = values.iloc[0]
    for line in (
        f"id {first['id']}",
        f"entropy: {first['entropy']:.5g}"[:13],
        "advantage: ",
        "trained on",
        "log-prob, trainer: ",
    ):
        assert line in tip
    assert f"advantage: {row['train_reward']:.4f}"[:16] in tip
    assert page.evaluate("document.querySelectorAll('#heat option').length") == 4
    page.evaluate(SHOW_TAB.format("group"))
    page.wait(
        "document.querySelectorAll('.card').length === 8 || document.querySelectorAll('.card').length === 1"
    )
    assert page.errors == []


@needs_chromium
@pytest.mark.slow
def test_hostile_texts_stay_text(hostile: Path, tmp_path: Path, page: Page) -> None:
    url = browse(load_run(hostile)).save(tmp_path / "page.html").as_uri()
    for number, text in enumerate(HOSTILE):
        # One tab by the page's address, a different one each time; the others by a click.
        for i, tab in enumerate(TABS[number % 3 :] + TABS[: number % 3]):
            if i == 0:
                page.open(f"{url}#sample={number}&tab={tab}")
            else:
                page.evaluate(SHOW_TAB.format(tab))
            page.wait(f"document.querySelector('.tabs .on')?.textContent === '{tab}'")
            assert page.evaluate("typeof window.hacked") == "undefined"
            assert (
                page.evaluate("document.querySelectorAll('#detail script, #detail img, #detail svg').length")
                == 0
            )
        page.evaluate(SHOW_TAB.format("group"))
        page.wait("document.querySelector('.card pre')")
        if number == 0:
            assert text in page.evaluate("document.querySelector('.card pre').textContent")
        if number == 3:
            assert (
                page.evaluate("[...document.querySelectorAll('.card .ctl')].map((e) => e.textContent)")[0]
                == "U+202E"
            )
    assert page.evaluate("document.querySelector('.card pre').textContent").endswith(
        "show all 1,000,005 characters"
    )
    assert page.errors == []


@needs_chromium
@pytest.mark.slow
def test_ten_thousand_samples_are_filtered(recorded_runs: Path, tmp_path: Path, page: Page) -> None:
    run = load_run(recorded_runs / "baseline")
    rows = run.read_samples("all", steps=0).drop(columns=["step"])
    layout = RunLayout(tmp_path / "large")
    for step in range(210):
        table = pa.Table.from_pandas(rows.assign(step=step), preserve_index=False)
        layout.step_dir(step, 0).mkdir(parents=True)
        pq.write_table(table, layout.step_dir(step, 0) / "part-0.parquet")
    page.open(browse(load_run(layout.root)).save(tmp_path / "page.html").as_uri())
    assert page.evaluate("index.step.length") > 9900
    page.evaluate("document.getElementById('low').value = '0.5'; apply()")
    assert page.evaluate("visible.every((i) => index.reward[i] >= 0.5)")
    assert page.evaluate("document.querySelectorAll('#rows .row').length") < 60  # only those in sight
    assert page.errors == []


def test_a_page_of_long_samples_is_cut(recorded_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of whole groups from the whole run, and the beginning and end of long texts; all samples are listed."""
    monkeypatch.setattr(data, "_MOST_TOKENS", 5000)
    monkeypatch.setattr(data, "_MOST_CHARACTERS", 20_000)
    monkeypatch.setattr(data, "_LEAST_TEXT", 20)
    monkeypatch.setattr(data, "_PART", 50)
    run = load_run(recorded_runs / "baseline")
    content = browse(run).content
    index = unpacked(content, "index")
    assert index["reward"][: len(run.samples)] == run.samples["reward"].tolist()
    count = len(index["step"])
    blocks = range(-(-count // data.BLOCK))
    texts = [text for k in blocks for text in unpacked(content, f"texts-{k}")]
    tokens = [entry for k in blocks for entry in unpacked(content, f"tokens-{k}")]
    assert len(texts) == len(tokens) == count
    there = [i for i, entry in enumerate(tokens) if entry]
    assert 0 < sum(len(tokens[i]["ids"]) for i in there) <= 5000
    groups = {(index["step"][i], index["group"][i], index["dataset"][i]) for i in there}
    assert len(there) == sum(
        key in groups for key in zip(index["step"], index["group"], index["dataset"], strict=True)
    )
    assert min(index["step"][i] for i in there) == 0 and max(index["step"][i] for i in there) >= 11
    responses = run.read_samples("text")["response"]
    longest = int(responses.str.len().to_numpy().argmax())
    said = texts[longest]["messages"][-1][1]
    assert "characters are not in this page" in said and said.endswith(responses.iloc[longest][-4:])
    notes = unpacked(content, "meta")["notes"]
    assert notes[0].startswith(f"tokens of {len(there)} of {count} samples") and "are cut" in notes[1]


@needs_chromium
@pytest.mark.slow
def test_search_finds_labels_metadata_and_failures(tmp_path: Path, page: Page) -> None:
    layout = RunLayout(tmp_path / "run")
    samples = [
        Sample(group_index=0, index=i, prompt="p", response="r", tokens=[1, 2], response_length=1, **said)
        for i, said in enumerate(
            [{"label": "Paris"}, {"metadata": {"city": "Rome"}}, {"failure": "Timeout"}, {}]
        )
    ]
    table = samples_to_table(samples, step=0, attempt=0, dataset="train", rewards=[0.0] * 4)
    layout.step_dir(0, 0).mkdir(parents=True)
    pq.write_table(table, layout.step_dir(0, 0) / "part-0.parquet")
    page.open(browse(load_run(layout.root)).save(tmp_path / "page.html").as_uri())
    for number, word in enumerate(("paris", "ROME", "timeout")):
        page.evaluate(f"document.getElementById('search').value = '{word}'; apply()")
        page.wait(f"visible.length === 1 && visible[0] === {number}")
    assert page.errors == []
