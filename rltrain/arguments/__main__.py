"""`python -m rltrain.arguments @recipe.toml --lr 1e-6 …`: the resolved configuration, and where each value is from.

Prints TOML that can be used as a recipe. Needs no GPU, no process group and no torch. Exit codes: 0, or 2 with the
reason where the arguments can't be right.
"""

from __future__ import annotations

import argparse
import sys

from rltrain import arguments
from rltrain.arguments.errors import UserError
from rltrain.arguments.explain import configuration, to_toml


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
    try:
        found = configuration(argv, _options_of_submit())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to_toml(found), end="")
    return 0


def _options_of_submit() -> set[str]:
    """What a recipe may also hold: where and how the job is started."""
    from hpc.config import add_submit_flags

    parser = argparse.ArgumentParser(add_help=False)
    add_submit_flags(parser)
    return {option.removeprefix("--") for option in parser._option_string_actions}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
