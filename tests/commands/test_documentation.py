"""What README and docs tell people to type is right: commands are parsed by their own parsers, blocks of code compile.

Commands of others (pip, docker, enroot …) are not checked here, but for the files of ours that they run.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import pytest
from helpers.run_files import LEAST

from hpc.submitting.command_line import full_parser, read_request
from rltrain import arguments
from rltrain.arguments import flags
from rltrain.run.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "analysis/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
OURS = ("hpc", "analysis", "rltrain", "examples", "benchmarks")
# Commands that pages give to show the refusal → a part of it.
REFUSED = {
    "--actor-num-gpus-per-node 6 --tensor-model-parallel-size 4": "does not divide the 6 trainer ranks"
}
ROLES = {  # take no arguments: the supervisor starts them
    "rltrain.sglang.router",
    "rltrain.sglang.engine",
    "rltrain.rollout",
    "rltrain.train",
}
STANDS_FOR = {"hpc.VERB"}  # any of them
WITH_TRAINING_FLAGS = {
    "hpc.submit",
    "hpc.doctor",
    "rltrain.arguments",
    "rltrain.tools.convert_hf_to_torch_dist",
}
# They have no parser and begin at once: only that they exist is checked here; → the test that runs them.
AT_ONCE = {
    "examples.coding_agent.make_prompts": "tests/examples/test_examples.py",
    "examples.small_model.make": "tests/examples/test_examples.py",
    "examples.smollm2.make_prompts": "tests/examples/test_example_smollm2.py",
    "examples.smollm2.prepare": "tests/examples/test_example_smollm2.py",
    "rltrain.demo.assets": "tests/examples/test_example_ppo.py",
    "rltrain.tools.snapshot_megatron_flags": "tests/arguments/test_arguments_megatron.py",
    "rltrain.tools.snapshot_engine_flags": "tests/arguments/test_arguments.py",
}
OWN_SWITCHES = {"hpc.doctor": ("--probe-nodes",)}
AND_TRAINING_FLAGS = ("hpc.resubmit", "hpc.evaluate")  # after their own


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its fence, its language and its text without indentation."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[2], textwrap.dedent(match[3])))
    return found


def commands() -> Iterator[tuple[str, str]]:
    """Place and text of every command, in blocks and in lines of text."""
    for block in blocks():
        text = block.text.replace("\\\n", " ")
        prompted = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        if prompted or block.language == "console":
            yield from ((str(block), line) for line in prompted)
        elif block.language in ("bash", "sh", "shell"):
            for line in text.splitlines():
                yield from ((str(block), part) for part in line.split(" && ") if part.strip())
        elif not block.language:
            found = re.findall(r"^(?:python -m|make) .*", text, re.MULTILINE)
            yield from ((str(block), line) for line in found)
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        name = str(page.relative_to(ROOT))
        found = re.findall(r"[`(](python\s+-m\s+[^`)]+|make\s+[a-z][a-z0-9-]+)[`)]", text)
        yield from ((name, " ".join(each.split())) for each in found)  # a line may end within one


COMMANDS = sorted({text: place for place, text in commands()}.items())


class _Parsed(Exception):  # noqa: N818 – no error
    """A command's parser has taken its arguments."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes that pages show, under the names that their commands use."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shown = {block.page: block.text for block in reversed(blocks()) if block.language == "toml"}
    (tmp_path / "recipe.toml").write_text(shown["README.md"])
    (tmp_path / "container.toml").write_text(shown["docs/containers.md"])
    (tmp_path / "my-cluster.toml").write_text(shown["docs/slurm.md"])
    (tmp_path / "variants.toml").write_text([b.text for b in blocks() if b.page == "docs/slurm.md"][-2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


_parse_known = argparse.ArgumentParser.parse_known_args


def _parse_only(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
    _, unknown = _parse_known(self, args, namespace)
    raise _Parsed(unknown)


@pytest.mark.parametrize(
    ("command", "where"), COMMANDS, ids=[f"{where}-{text[:60]}" for text, where in COMMANDS]
)
def test_a_documented_command(
    command: str, where: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        word for word in shlex.split(command, comments=True) if "…" not in word and not word.startswith("[")
    ]
    words = [*itertools.takewhile(lambda word: word not in ("|", ">", ">>", "<", "&", ";", "||"), words)]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = {word for word in words[1:] if "=" not in word}
        assert asked <= {name for line in targets for name in line.split()}, f"{where}: {command}"
    elif words[:2] == ["python", "-m"] and words[2].partition(".")[0] in OURS:
        said = next((said for part, said in REFUSED.items() if part in command), None)
        with pytest.raises(UserError, match=said) if said else nullcontext():
            check_module(words[2], words[3:], monkeypatch)
    elif words[0].startswith("--"):
        arguments.parse([*LEAST, *words])
    elif "/" in words[0] and words[0][0] not in "/~.":
        assert os.access(ROOT / words[0], os.X_OK), f"{where}: there is no {words[0]}"


def check_module(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own parser takes the words."""
    if module in STANDS_FOR:
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None
    if spec.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__") is not None
    if module in ROLES or module in ("hpc", "analysis"):  # they have no arguments
        assert not words
    elif not words:  # a mention of the program
        return
    elif module in AT_ONCE:
        assert (ROOT / AT_ONCE[module]).is_file()
    elif module in WITH_TRAINING_FLAGS:
        check_flags([word for word in words if word not in OWN_SWITCHES.get(module, ())])
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", _parse_only)
        monkeypatch.setattr(sys, "argv", [module, *words])
        name = f"{module}.__main__" if spec.submodule_search_locations is not None else module
        main = importlib.import_module(name).main
        takes_words = main.__code__.co_argcount
        try:
            main(words) if takes_words else main()
        except _Parsed as parsed:
            (unknown,) = parsed.args
            monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", _parse_known)
            if module in AND_TRAINING_FLAGS:
                check_flags(unknown)
            else:
                assert unknown == [], f"{module} {words}"
        except SystemExit as end:
            assert end.code in (0, None), f"{module} {words}"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("hpc.logs", ["demo", "--rol", "trainer"]),
        ("analysis.plot", ["runs/demo", "--nonsense"]),
        ("hpc.submit", ["--leraning-rate", "1"]),
    ],
)
def test_a_wrong_command_would_be_seen(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((UserError, AssertionError)):
        check_module(module, words, monkeypatch)


def check_flags(words: list[str]) -> None:
    if words == ["--help"]:
        assert "--hf-checkpoint" in full_parser().format_help()
        return
    request = read_request(words)
    least = flags.split(LEAST)[1]
    arguments.parse(flags.to_argv(flags.merge(least, request.train)))


def calls() -> list[str]:
    """The calls in the table of functions of docs/cli.md."""
    table = re.search(r"^\| verb \| function \|.*?\n\n", (ROOT / "docs/cli.md").read_text(), re.M | re.S)
    assert table is not None
    return re.findall(r"`(hpc\.[^`]+\))`", table[0])


CALLS = calls()


@pytest.mark.parametrize("call", CALLS)
def test_a_documented_function_is_there_and_takes_what_is_shown(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    module, _, name = ast.unparse(node.func).rpartition(".")
    function = getattr(importlib.import_module(module), name)
    inspect.signature(function).bind(*node.args, **{str(each.arg): each.value for each in node.keywords})


def test_the_table_names_a_function_of_every_verb_that_is_one() -> None:
    assert [call.split(".")[1] for call in CALLS] == [
        *("submit", "status", "logs", "logs", "cancel", "resubmit", "evaluate", "doctor", "accounting")
    ]


PYTHON = [block for block in blocks() if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_documented_code_compiles_and_its_imports_are_there(block: Block) -> None:
    text = block.text
    if re.match(r'"\w+": ', text):  # an entry of a dict
        text = f"{{{text}}}"
    if re.search(r"\):\s*(#.*)?$", text.rstrip()):  # a signature
        text = f"{text.rstrip()}\n    ..."
    for node in ast.walk(
        compile(text, str(block), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    ):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in OURS:
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            assert all(
                importlib.util.find_spec(a.name) for a in node.names if a.name.partition(".")[0] in OURS
            )


# Lines that need what the demo's runs lack.
NEEDS_MORE = {"load_wandb(": "W&B's files: tests/analysis/test_analysis_wandb.py"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "analysis/README.md"])
def test_documented_analysis_runs_on_a_run(
    page: str, recorded_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in [("demo", "fast"), ("lr-1", "fast"), ("lr-2", "baseline")]:
        shutil.copytree(recorded_runs / source, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    found = [
        block
        for block in PYTHON
        if block.page == page and "run." in block.text and "polars" not in block.text
    ]
    assert found
    names: dict[str, Any] = {}
    for block in found:
        lines = [
            line for line in block.text.splitlines() if not any(line.startswith(part) for part in NEEDS_MORE)
        ]
        exec(compile("\n".join(lines), str(block), "exec"), names)
    plt.close("all")


def test_every_page_and_every_recipe_of_a_model_is_named() -> None:
    readme, recipes = ((ROOT / name).read_text() for name in ("README.md", "docs/arguments.md"))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == {*re.findall(r"\]\(docs/([\w.]+)", readme)}
    models = {f"@{file.stem}" for file in (ROOT / "rltrain/models").glob("*.toml")}
    assert models == {*re.findall(r"`(@[\w.-]+)` ?[,|]", recipes.partition("## The model's shape")[2])}


OF_SLIME = {"examples/fully_async"}  # named where our counterpart is told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Links within the project, and paths of its own folders in backticks."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    folders = "|".join([*OURS, "docs", "tests", "requirements", "containers", "slurm_templates"])
    paths = {*re.findall(rf"`((?:{folders})/[\w./-]+)`", text)} - OF_SLIME
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists() and not (page.parent / path).exists()]
    assert missing == []
