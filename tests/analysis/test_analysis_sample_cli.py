"""`python -m analysis.sample`: which samples are printed, and that no text of the model steers the terminal."""

from pathlib import Path

import pytest
from helpers.synthetic_run import write_run

from analysis import load_run
from analysis.sample import MAX_CHARACTERS, clip, main, pick, prompt_text
from rltrain.run.layout import RunLayout
from rltrain.run.terminal import visible


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", steps=6)


def test_prints_prompt_response_label_and_numbers(
    layout: RunLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(layout.root), "--step", "3", "-n", "6"]) == 0
    out = capsys.readouterr().out
    row = load_run(layout.root).read_samples("text", steps=3).iloc[1]
    assert f"step 3 · group {row['group_index']} · sample {row['index']}" in out
    assert f"response {row['response_length']} tokens · weights 3" in out
    assert row["response"] in out
    assert out.count("user: What is") == 6
    assert "failed: reward: timed out after 30 s" in out


def test_nothing_reaches_the_terminal_as_control(
    layout: RunLayout, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(layout.root), "--step", "3", "-n", "1"])
    out = capsys.readouterr().out
    assert r"\x1b[31mred\x1b[0m \u202ereversed \x07" in out
    assert not {"\x1b", "\u202e", "\x07"} & set(out)


def test_best_and_worst_of_the_newest_step(layout: RunLayout) -> None:
    run = load_run(layout.root)
    last = run.samples[run.samples["step"] == 5]
    assert set(pick(run, None, None, 3)["step"]) == {5}
    assert list(pick(run, None, "best", 3)["reward"]) == sorted(last["reward"], reverse=True)[:3]
    assert list(pick(run, None, "worst", 3)["reward"]) == sorted(last["reward"])[:3]


def test_errors_are_one_line_and_exit_2(
    layout: RunLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(layout.root), "--step", "77"]) == 2
    assert capsys.readouterr().err == "error: no samples of step 77: steps 0 to 5 have some\n"
    RunLayout(tmp_path).metrics.touch()
    assert main([str(tmp_path)]) == 2
    assert "no samples yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ünïcödé 漢字 🎈\nnext", "plain ünïcödé 漢字 🎈\nnext"),
        ("a\r\x00b", r"a\r\x00b"),
        ("\x9b31m", r"\x9b31m"),
        ("\ud800 \u2028", r"\ud800 \u2028"),
        (r"a\nb", r"a\nb"),
    ],
)
def test_no_text_steers_the_terminal(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_prompts_that_only_look_like_messages_are_shown_as_they_are() -> None:
    for prompt in ("[1, 2] is a list", "[1, 2]", '[{"text": 1}]', None):
        assert prompt_text(prompt) == prompt


def test_long_texts_are_cut_in_the_middle() -> None:
    text = "a" * 600_000 + "b" * 400_000
    cut = clip(text)
    assert len(cut) < MAX_CHARACTERS + 60
    assert cut.startswith("a") and cut.endswith("b")
    assert "996,000 characters left out" in cut
    assert clip("short") == "short"
