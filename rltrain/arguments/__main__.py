"""`python -m rltrain.arguments @recipe.toml --lr 1e-6 …`: the resolved configuration, and the source of each value.

Prints TOML that can be used as a recipe. Needs no GPU, no process group and no torch. Exit codes: 0, or 2 with the
reason where the arguments can't be right.
"""

from __future__ import annotations

import argparse
import sys

from rltrain import arguments
from rltrain.arguments.explain import configuration, to_toml
from rltrain.arguments.recipes import SUBMIT_OPTIONS
from rltrain.run.errors import run_main


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        parser = argparse.ArgumentParser(
            prog="python -m rltrain.arguments",
            usage="%(prog)s [@RECIPE …] [--FLAG VALUE …]",
            description=__doc__,
        )
        arguments.add_flags(parser)
        parser.print_help()
        return 0
    return run_main(lambda: print(to_toml(configuration(argv, SUBMIT_OPTIONS)), end=""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
