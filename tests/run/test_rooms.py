"""The contract of the house (rooms.toml): who may import whom, no circles, small folders, and design.md says the same.

For the arrows every import counts, wherever it stands in a file: late ones, and those for type checkers only, too. What
comes with a module when it is imported (`closure`) leaves those out, and has the `__init__` of every folder above it.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rltrain", "hpc", "analysis", "slurm_templates")
DESIGN = ROOT / "docs" / "design.md"
MOST_FILES = 15  # of Python in a folder


@dataclass(frozen=True)
class Room:
    """What a folder or module is for.

    Attributes:
        imports: rooms that it may import, or single modules of them.
        without: packages of others that do not come with it when it is imported, and that it does not import later.
        not_itself: packages that only what it imports may import.
    """

    name: str
    reason: str
    imports: tuple[str, ...]
    without: tuple[str, ...] = ()
    not_itself: tuple[str, ...] = ()

    def may_import(self, module: str) -> bool:
        """Whether one of ours is in a room, or is a module, that it may import; or in this room itself."""
        return {module, room_of(module, rooms())} & {self.name, *self.imports} != set()


@cache
def rooms() -> dict[str, Room]:
    """The rooms by name, from the ground up."""
    table = tomllib.loads(Path(__file__).with_name("rooms.toml").read_text())
    return {
        each["name"]: Room(
            *(each["name"], each["reason"]),
            *(tuple(each.get(name, ())) for name in ("imports", "without", "not_itself")),
        )
        for each in table["room"]
    }


def room_of(module: str, names: Mapping[str, Room]) -> str | None:
    """The room with the longest name that the module's begins with."""
    found = [name for name in names if module == name or module.startswith(f"{name}.")]
    return max(found, key=len, default=None)


@cache
def modules() -> dict[str, Path]:
    """Files of the project by the name of their module."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


@cache
def imported(module: str) -> frozenset[str]:
    """Modules that one of ours imports anywhere: ours by their own names, those of others as they are written."""
    return frozenset(_imported(ast.parse(modules()[module].read_text()).body)) - {module}


@cache
def imported_at_once(module: str) -> frozenset[str]:
    """The same of what runs when that module is imported."""
    return frozenset(_imported(ast.parse(modules()[module].read_text()).body, at_once=True)) - {module}


def closure(module: str) -> dict[str, str]:
    """Modules of ours that come with one of ours when it is imported, each with the one that imports it."""
    found = {module: module}
    waiting = [module]
    for each in waiting:
        for name in {each, *imported_at_once(each)}:
            words = name.split(".")
            for other in (".".join(words[:length]) for length in range(1, len(words) + 1)):
                if other in modules() and other not in found:
                    found[other] = each
                    waiting.append(other)
    return found


def _statements(nodes: Iterable[ast.AST], at_once: bool) -> Iterator[ast.AST]:
    """These and all in them; there are ten times as many expressions, none of which imports anything.

    Args:
        at_once: without what functions do when they are called, and what is for type checkers only.
    """
    for node in nodes:
        yield node
        inside = ["body", "orelse", "handlers", "finalbody", "cases"]
        if at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_once and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside.remove("body")
        for inner in inside:
            yield from _statements(getattr(node, inner, ()), at_once)


def _imported(nodes: Iterable[ast.AST], at_once: bool = False) -> Iterator[str]:
    for node in _statements(nodes, at_once):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not used here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module


def test_a_room_imports_only_rooms_below_it() -> None:
    seen: set[str] = set()
    for room in rooms().values():
        assert {room_of(each, rooms()) for each in room.imports} <= seen, (
            f"{room.name} imports a room that stands after it"
        )
        seen.add(room.name)


def test_the_packages_go_one_way() -> None:
    """`analysis` → `hpc` → `rltrain`."""
    for room in rooms().values():
        below = {"rltrain": ("rltrain",), "hpc": ("hpc", "rltrain")}.get(
            room.name.partition(".")[0], PACKAGES
        )
        assert all(each.partition(".")[0] in below for each in room.imports), f"{room.name} imports upwards"


def test_every_module_keeps_to_its_room() -> None:
    wrong = []
    for module in modules():
        if module in PACKAGES and not imported(module):
            continue
        own = room_of(module, rooms())
        assert own is not None, f"{module} belongs to no room of rooms.toml"
        theirs = [other for other in imported(module) if other in modules()]
        wrong += [f"{module} → {other}" for other in theirs if not rooms()[own].may_import(other)]
    assert not wrong, "imports that rooms.toml does not allow:\n" + "\n".join(sorted(wrong))


def test_every_room_is_there_and_needs_what_it_may_import() -> None:
    used: dict[str, set[str | None]] = {name: set() for name in rooms()}
    for module in modules():
        if (own := room_of(module, rooms())) is not None:
            for other in imported(module) & modules().keys():
                used[own] |= {other, room_of(other, rooms())}
    for room in rooms().values():
        path = ROOT / room.name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"there is no {room.name}"
        assert set(room.imports) <= used[room.name], f"{room.name} does not import all that it may"


def test_no_circle_of_files() -> None:
    graph = {module: {other for other in imported(module) if other in modules()} for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"files import each other in a circle: {' → '.join(error.args[1])}") from None


def packages(names: Iterable[str]) -> set[str]:
    """Packages of others that these modules are in."""
    return {name.partition(".")[0] for name in names} - set(PACKAGES)


def test_packages_of_others() -> None:
    for module in modules():
        own = room_of(module, rooms())
        theirs = packages(imported(module))
        if own == "rltrain.run":
            assert theirs <= sys.stdlib_module_names, (
                f"{module}: the ground floor uses the standard library only"
            )
        elif own is not None:
            without = {*rooms()[own].without, *rooms()[own].not_itself}
            assert not theirs & without, f"{module} imports what {own} does without"


def test_packages_of_others_that_come_with_an_import() -> None:
    wrong = []
    for module in modules():
        own = room_of(module, rooms())
        for other, by in closure(module).items() if own and rooms()[own].without else ():
            if found := packages(imported_at_once(other)) & set(rooms()[own].without):
                wrong.append(f"{module} … {by} → {other} → {', '.join(sorted(found))}")
    assert not wrong, "imports that come with others, and that rooms.toml does not allow:\n" + "\n".join(
        wrong
    )


def test_what_comes_with_an_import() -> None:
    """Every `__init__` above it does; what a function imports, or a type checker, does not."""
    source = """
import json
if TYPE_CHECKING:
    import socket
else:
    import select
try:
    import tomllib
except ImportError:
    import toml
class Job:
    import signal
    def run(self):
        import subprocess
"""
    at_once = set(_imported(ast.parse(source).body, at_once=True))
    assert at_once == {"json", "select", "tomllib", "toml", "signal"}
    assert set(_imported(ast.parse(source).body)) == {*at_once, "socket", "subprocess"}
    assert {"hpc", "hpc.slurm", "hpc.slurm.cluster"} <= closure("hpc.planning.sbatch_flags").keys()
    assert not {"hpc.slurm.client", "hpc.submitting.executor"} & closure("hpc.planning.sbatch_flags").keys()


def test_no_folder_holds_too_many_files() -> None:
    folders = [
        path for top in (*PACKAGES, "tests", "benchmarks") for path in [ROOT / top, *(ROOT / top).rglob("*")]
    ]
    counts = {str(path.relative_to(ROOT)): len(list(path.glob("*.py"))) for path in folders if path.is_dir()}
    assert not {name for name, count in counts.items() if count > MOST_FILES}


def table() -> str:
    """The rooms as Markdown, from the top down."""
    lines = ["| room | its one reason to exist | may import |", "|---|---|---|"]
    for room in reversed(rooms().values()):
        names = ", ".join(f"`{name}`" for name in room.imports) or "–"
        lines.append(f"| `{room.name}` | {room.reason} | {names} |")
    return "\n".join(lines)


_TABLE = re.compile(r"(?<=\n\n)\| room \| .*?(?=\n\n)", re.DOTALL)


def test_the_design_page_says_the_same() -> None:
    found = _TABLE.search(DESIGN.read_text())
    assert found is not None
    assert found[0] == table(), "docs/design.md differs: run python tests/run/test_rooms.py"


_FILE = re.compile(r"[\w./-]*\w\.py\b")


def pages() -> list[str]:
    """Every Markdown file of the repository."""
    folders = (*PACKAGES, "benchmarks", "containers", "docs", "examples", "tests")
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]
    return sorted(str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("page", pages())
def test_the_docs_name_files_that_exist(page: str) -> None:
    """A path is one from the repository, from `rltrain/` or from the page's folder; a name alone is any file's."""
    of_slime_and_megatron = {"train_async.py", "megatron/training/arguments.py"}
    places = (ROOT, ROOT / "rltrain", (ROOT / page).parent)
    folders = (*PACKAGES, "benchmarks", "examples", "tests")
    names = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    named = set(_FILE.findall((ROOT / page).read_text()))
    unknown = {
        name
        for name in named
        if (name not in names if "/" not in name else not any((place / name).is_file() for place in places))
    }
    assert unknown <= of_slime_and_megatron


def walks() -> dict[str, str]:
    """The pictures of design.md's walks by what walks; `{a,b}.py` as two files."""
    text = DESIGN.read_text().partition("\n## Four walks\n")[2].partition("\n## ")[0]
    found = dict(re.findall(r"\*\*A (.*?)\*\*.*?```\n(.*?)\n```", text, re.DOTALL))
    for name, picture in found.items():
        found[name] = re.sub(
            r"([\w/]*)\{([\w,]+)\}\.py",
            lambda match: " ".join(f"{match[1]}{each}.py" for each in match[2].split(",")),
            picture,
        )
    return found


def test_the_walks_name_whole_paths_and_what_is_in_those_files() -> None:
    """A function's name ends in `()`; a class's has several capitals. The files are those of the same line."""
    assert walks().keys() == {"prompt", "flag", "stop signal", "weight push"}
    checked = 0
    for line in "\n".join(walks().values()).splitlines():
        files = [ROOT / name if name.startswith(("hpc/", "analysis/")) else ROOT / "rltrain" / name
                 for name in _FILE.findall(line)]  # fmt: skip
        assert [path for path in files if not path.is_file()] == [], line
        text = "\n".join(path.read_text() for path in files)
        words = [f"def {name}(" for name in re.findall(r"\b(\w+)\(\)", line)] if files else []
        words += re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", line) if files else []
        assert [word for word in words if word not in text] == [], line
        checked += len(words)
    assert checked > 20


def test_the_walk_of_a_prompt_counts_its_files() -> None:
    text = DESIGN.read_text().partition("**A prompt**")[2].partition("**A flag**")[0]
    said = re.search(r"changes form in these (\d+) files;\s(\d+) run", text)
    assert said is not None
    beside = set(_FILE.findall(text.rpartition("```")[2]))
    forms = set(_FILE.findall(walks()["prompt"]))
    assert [*map(int, said.groups())] == [len(forms), len(forms | beside)]


if __name__ == "__main__":
    DESIGN.write_text(_TABLE.sub(lambda _: table(), DESIGN.read_text()))
