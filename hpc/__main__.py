"""`python -m hpc` lists the verbs, each with the first line of its module's docstring."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

VERBS = (
    "submit",
    "status",
    "logs",
    "cancel",
    "resubmit",
    "evaluate",
    "doctor",
    "accounting",
    "sandbox",
    "chaos",
)


def describe(verb: str) -> str:
    """One line that describes a verb. It is read from the source, because importing all verbs takes time.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    spec = importlib.util.find_spec(f"hpc.{verb}")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"hpc.{verb}")
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return text.partition("\n")[0].partition(". ")[0].rstrip(".:")


def main() -> None:
    """Print them."""
    print("usage: python -m hpc.VERB [--help]\n")
    for verb in VERBS:
        print(f"  {verb:11} {describe(verb)}")


if __name__ == "__main__":
    main()
