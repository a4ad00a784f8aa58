"""What all verbs have in common: the list, `--help`, light imports, and documentation that is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import cli
from hpc.__main__ import VERBS, describe
from rltrain.run.layout import RunLayout

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
HEAVY = "{'torch', 'pandas', 'numpy', 'submitit', 'wandb', 'rich', 'pyarrow', 'jinja2'}"


TYPOS = [
    (["status", "--jsn"], "--json"),
    (["logs", "demo", "--rol=trainer"], "--role"),
    (["accounting", "demo", "--runs-dirr", "x"], "--runs-dir"),
    (["cancel", "demo", "--noww"], "--now"),
    (["submit", "--partiton=gpu"], "--partition"),
    (["doctor", "--nodess=4"], "--nodes"),
]
# Verbs as `python -m` starts them, one after the other: most of the time of each would be imports.
SAY = """
import contextlib, io, json, runpy, sys
said = []
for verb, *words in json.load(sys.stdin):
    sys.argv, out, code = [verb, *words], io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_module(f"hpc.{verb}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    said.append((out.getvalue(), code))
print(json.dumps(said))
"""
IMPORT = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"


def python(*words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def said() -> dict[tuple[str, ...], tuple[str, int]]:
    """What verbs say to `--help` and to typos, and their exit codes."""
    commands = [*([verb, "--help"] for verb in VERBS), *(words for words, _ in TYPOS)]
    done = python("-c", SAY, given=json.dumps(commands))
    assert done.returncode == 0, done.stderr
    return {tuple(words): tuple(each) for words, each in zip(commands, json.loads(done.stdout), strict=True)}


@pytest.fixture(scope="module")
def helps(said: dict[tuple[str, ...], tuple[str, int]]) -> dict[str, str]:
    """Output of `--help` of every verb."""
    return {verb: said[verb, "--help"][0] for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_list(helps: dict[str, str], verb: str) -> None:
    assert f"usage: python -m hpc.{verb}" in helps[verb]
    assert len(describe(verb)) > 10
    if verb not in ("submit", "sandbox"):
        assert "example:" in helps[verb] and "exit codes:" in helps[verb]
    assert f"\n## {verb}\n" in DOCS.read_text()


@pytest.mark.parametrize(("words", "near"), TYPOS)
def test_a_typo_names_the_nearest_flag(
    words: list[str], near: str, said: dict[tuple[str, ...], tuple[str, int]]
) -> None:
    text, code = said[tuple(words)]
    assert code in (1, 2)  # the doctor lists it among what would fail
    assert f"did you mean {near}?" in " ".join(text.split())


def test_the_list_is_complete() -> None:
    shown = python("-m", "hpc").stdout
    assert [line.split()[0] for line in shown.splitlines()[2:]] == list(VERBS)
    assert all(len(line) < 130 for line in shown.splitlines())
    assert shown in DOCS.read_text()


def test_flags_in_the_documentation_exist(helps: dict[str, str]) -> None:
    sections = re.split(r"\n## (\w+)\n", DOCS.read_text())[1:]
    for verb, text in zip(sections[::2], sections[1::2], strict=True):
        named = re.findall(r"python -m hpc\.(\w+)([^`\n]*)", text)
        assert named, verb
        for other, words in named:
            for flag in re.findall(r"--[a-z-]+", words):
                known = helps[other] + (
                    helps["submit"] if other in ("resubmit", "evaluate", "doctor") else ""
                )
                assert flag in known, f"{verb}: python -m hpc.{other} has no {flag}"


def test_starting_up_is_light() -> None:
    modules = [
        f"hpc.{verb}.__main__" if verb == "doctor" else f"hpc.{verb}" for verb in VERBS if verb != "sandbox"
    ]
    code = f"{IMPORT}    print(name, *({HEAVY} & set(sys.modules)))\n"
    code += "import hpc.sandbox\nprint(*{'pandas', 'torch'} & set(sys.modules))"
    done = python("-c", code, *modules)
    assert (done.stdout.split("\n"), done.returncode) == ([*modules, "", ""], 0), done.stderr


def test_commands_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "python_command", lambda: "python")
    assert cli.command("logs", RunLayout(tmp_path / "runs" / "x"), "-f") == "python -m hpc.logs x -f"
    elsewhere = RunLayout(Path("/data/my runs/x"))
    assert cli.command("logs", elsewhere) == "python -m hpc.logs x --runs-dir '/data/my runs'"
