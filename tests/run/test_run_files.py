"""The ground floor: JSON lines while they grow, files that are replaced as a whole, errors and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rltrain.run.errors import EXIT_NEVER_RESTART, EXIT_USAGE, UserError, nearest, nearest_few, run_main
from rltrain.run.files import (
    append_line,
    newest_lines,
    parse_lines,
    put_in_place,
    read_json,
    read_last_lines,
    read_lines,
    read_object,
    replace_link,
    replace_text,
    replacing,
)
from rltrain.run.metric_lines import newest_rows


def test_a_line_is_read_when_it_has_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_text('{"a": 1}\n\nbroken\n[1]\n{"a": 2}')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3, "path": Path("é")})
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3, "path": "é"}]


def test_bad_lines_are_named_by_number() -> None:
    complaints: dict[int, str] = {}
    assert parse_lines(b'{"a": 1}\n\n{"a\n[1]\n\xff\n{"a": 2}\n', complaints.__setitem__) == [
        {"a": 1},
        {"a": 2},
    ]
    assert sorted(complaints) == [3, 4, 5]
    assert complaints[4] == "the line is not a JSON object"


def test_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_last_lines(path, 100) == list(newest_lines(path, 100)) == []
    for i in range(100):
        append_line(path, {"i": i})
    assert read_last_lines(path, 25) == [{"i": 98}, {"i": 99}]
    assert list(newest_lines(path, 25)) == [{"i": 99}, {"i": 98}]
    assert read_last_lines(path, 10**6) == read_lines(path) == list(newest_lines(path, 10**6))[::-1]


def test_lines_of_one_step_and_attempt_are_one_row() -> None:
    rows = [
        {"step": 0, "attempt": 0, "x": 1},
        {"step": 1, "attempt": 0, "x": 2, "y": 2},
        {"step": 1, "attempt": 1, "x": 3},
        {"step": 1, "attempt": 1, "z": 4},
        {"x": 5},
    ]
    assert newest_rows(rows) == {0: rows[0], 1: {"step": 1, "attempt": 1, "x": 3, "z": 4}}


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "x"
    replace_text(path, "é", durable)
    with pytest.raises(RuntimeError, match="in the middle"), replacing(path, durable) as file:
        file.write(b"half")
        raise RuntimeError("in the middle")
    assert path.read_text() == "é"
    replace_text(path, "new", durable)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["new"]


def test_a_link_is_replaced(tmp_path: Path) -> None:
    for target in ("a", "b"):
        replace_link(tmp_path / "latest", target)
        assert str((tmp_path / "latest").readlink()) == target
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for number in (1, 2):
        draft = tmp_path / ".model.tmp"
        draft.mkdir()
        (draft / f"weights-{number}").touch()
        put_in_place(draft, final)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert [path.name for path in final.iterdir()] == [f"weights-{number}"]


def test_a_directory_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "weights").touch()
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "never-written", final)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (final / "weights").exists()
    (tmp_path / "draft").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        put_in_place(tmp_path / "draft", tmp_path / "file")
    assert (tmp_path / "file").is_file()


def test_a_json_file_of_a_person_is_an_object_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    for content, words in ((b"[]", "it is a list"), (b"{", "not valid JSON"), (b"\xff", "not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"config.json.*{words}"):
            read_object(path)
    path.unlink()
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        read_object(path)
    path.mkdir()
    with pytest.raises(UserError, match=r"config\.json can't be read: Is a directory"):
        read_object(path)


def test_json_that_is_missing_or_broken_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "x") is None
    (tmp_path / "x").write_text('{"a')
    assert read_json(tmp_path / "x") is None
    (tmp_path / "x").write_text(json.dumps([1]))
    assert read_json(tmp_path / "x") == [1]


def test_an_error_for_people_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("--lr: give a number.")

    assert run_main(fail) == EXIT_USAGE
    assert run_main(fail, EXIT_NEVER_RESTART) == EXIT_NEVER_RESTART
    assert capsys.readouterr().err == "error: --lr: give a number.\n" * 2
    assert (run_main(lambda: 75), run_main(lambda: None)) == (75, 0)
    with pytest.raises(UserError):
        run_main(fail, kinds=ValueError)


def test_the_nearest_word() -> None:
    assert nearest("partitoin", ["account", "partition"]) == "partition"
    assert nearest("xyz", ["account", "partition"]) is None
    assert nearest_few("tab", ["table", "cab", "ta"], 2) == ["ta", "table"]
