"""Submit a run: `python -m hpc.submit @recipe.toml --lr 1e-4`. Without Slurm the run starts on this machine.

Exit codes: 0 finished, 130 interrupted (the run can be resumed), 1 failed, 2 bad input.
"""

from __future__ import annotations

import sys

from hpc import cli
from hpc.submitting.command_line import FOR_DEMO, full_parser, read_request, refuse_without_partition
from hpc.submitting.start_run import submit_run
from rltrain.run.errors import EXIT_INTERRUPTED


def submit(argv: list[str]) -> int:
    """Submit what a command line asks for; returns an exit code.

    Raises:
        UserError: bad input; nothing has been started.
    """
    request = read_request(argv)
    if request.options.sweep:
        from hpc.submitting.sweep_jobs import submit_sweep

        return submit_sweep(argv, request)
    refuse_without_partition(argv, request.options)
    if request.train.keys() <= set(FOR_DEMO) and not request.options.layout.root.exists():
        from hpc.submitting.demo import submit_demo

        return submit_demo(request.options, request.train)
    return submit_run(request.options, request.train)


def main() -> int:
    """The command line; returns an exit code."""
    return cli.run_main(_submit_or_explain)


def _submit_or_explain(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        full_parser().print_help()
        return 0
    try:
        return submit(argv)
    except KeyboardInterrupt:
        print("interrupted before anything was started", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
