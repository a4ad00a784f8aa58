"""Submit a run: `python -m hpc.submit @recipe.toml --lr 1e-4`. On a machine without Slurm it runs there.

Exit codes: 0 finished, 130 interrupted (the run can be resumed), 1 failed, 2 bad input.
"""

from __future__ import annotations

import sys

from hpc import config
from hpc.run import EXIT_INTERRUPTED, submit_run
from rltrain.arguments import UserError

EXIT_USAGE = 2


def submit(argv: list[str]) -> int:
    """Submit what a command line asks for; returns an exit code.

    Raises:
        UserError: bad input; nothing has been started.
    """
    request = config.read_request(argv)
    if request.options.sweep:
        from hpc.submit_sweep import submit_sweep

        return submit_sweep(argv, request)
    if not request.train and not request.options.layout.root.exists():
        from hpc.demo import submit_demo

        return submit_demo(request.options)
    return submit_run(request.options, request.train)


def main() -> int:
    """The command line; returns an exit code."""
    argv = sys.argv[1:]
    if "-h" in argv or "--help" in argv:
        config.full_parser().print_help()
        return 0
    try:
        return submit(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted before anything was started", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
