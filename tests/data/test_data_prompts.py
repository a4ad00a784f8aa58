"""Prompt files: what is read, and what the message says about each way in which a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rltrain.data.prompt_file import Prompt, PromptFile, check_prompt_file, split_slice
from rltrain.run.errors import UserError


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_reads_text_and_conversations_with_their_labels_metadata_and_tools(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function"}]
    path = write(
        tmp_path / "p.jsonl",
        {"input": "1+1=", "label": "2", "metadata": {"a": 1}},
        "",
        {"input": chat, "label": 3, "tools": tools},
    )
    assert list(PromptFile(path, "input", "label")) == [
        Prompt("1+1=", "2", {"a": 1}),
        Prompt(chat, 3, {}, tools),
    ]
    assert [each.label for each in PromptFile(path, "input")] == [None, None]


@pytest.mark.parametrize(
    ("window", "numbers"),
    [("[:3]", [0, 1, 2]), ("[7:]", [7, 8, 9]), ("[2:4]", [2, 3]), ("[-2:]", [8, 9]), ("[:-8]", [0, 1])],
)
def test_slices_are_pythons(tmp_path: Path, window: str, numbers: list[int]) -> None:
    path = write(tmp_path / "p.jsonl", *({"input": str(i)} for i in range(10)))
    assert [int(str(each.prompt)) for each in PromptFile(f"{path}@{window}", "input")] == numbers
    assert check_prompt_file(f"{path}@{window}", "input", None) == len(numbers)


def test_an_at_sign_alone_is_part_of_the_name() -> None:
    assert split_slice("data/a@b.jsonl") == (Path("data/a@b.jsonl"), slice(None))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"input": "x"', ["p.jsonl:2", "not valid JSON"]),
        ("[1]", ["p.jsonl:2", "list", "object"]),
        ({"prompt": "x", "answer": "y"}, ["p.jsonl:2", "'input'", "'prompt', 'answer'", "--input-key"]),
        ({}, ["p.jsonl:2", "none at all"]),
        ({"input": "x"}, ["p.jsonl:2", "'label'", "--label-key"]),
        ({"input": 3, "label": ""}, ["p.jsonl:2", "int", "messages"]),
        ({"input": [], "label": ""}, ["p.jsonl:2", "list"]),
        ({"input": [{"role": "user"}], "label": ""}, ["p.jsonl:2", "'content'"]),
        ({"input": "x", "label": "", "metadata": [1]}, ["p.jsonl:2", "'metadata'", "list"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, words: list[str]) -> None:
    path = write(tmp_path / "p.jsonl", {"input": "good", "label": "good"}, line)
    with pytest.raises(UserError) as caught:
        check_prompt_file(path, "input", "label")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_text(""), "no prompts"),
        (lambda path: path.write_text("\n\n"), "no prompts"),
        (lambda path: path.write_bytes(b'{"input": "\xff\xfe"}\n'), "not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, make, words: str) -> None:
    path = tmp_path / "p.jsonl"
    make(path)
    with pytest.raises(UserError, match=words) as caught:
        check_prompt_file(str(path), "input", None)
    assert str(path) in str(caught.value)


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"input": "x"})
    with pytest.raises(UserError, match=r"@\[5:\]: no prompts in that slice"):
        check_prompt_file(f"{path}@[5:]", "input", None)


def test_is_light_to_import() -> None:
    heavy = {"torch", "transformers", "pyarrow", "numpy"}
    code = f"import sys, rltrain.data.prompt_file; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
