"""`python -m analysis` lists the commands, each with the first line of its module's docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

COMMANDS = ("sample", "doctor", "report", "serve", "plot", "export", "trace", "demo_data")
_USAGE = re.compile(r"`python -m [^`]+`: (?P<what>.+)")


def describe(name: str) -> str:
    """One line that describes a command. It is read from the source, because importing all of them takes time."""
    text = (
        ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
    )
    line = text.partition("\n")[0].rstrip(".")
    match = _USAGE.match(line)
    return match["what"] if match else line


def main() -> None:
    """Print them."""
    print("usage: python -m analysis.COMMAND [--help]\n")
    for name in COMMANDS:
        print(f"  {name:10} {describe(name)}")
    print("\nIn Python: from analysis import load_run; run = load_run('runs/demo')")


if __name__ == "__main__":
    main()
