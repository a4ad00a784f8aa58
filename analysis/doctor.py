"""`python -m analysis.doctor RUN_DIR [--json] [--fail-on warning]`: what looks wrong with a run, and what to do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from analysis.run import load_run
from rltrain.run.errors import run_main
from rltrain.run.terminal import safe_text

_LEVELS = {"error": 1, "warning": 2, "note": 3, "never": 0}


def main(argv: list[str] | None = None) -> int:
    """Print the findings; 1 if one is at least as bad as `--fail-on`, 2 if there is no such run."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.doctor", description="Say what looks wrong with a run."
    )
    parser.add_argument("run_dir", type=Path, help="directory of the run, for example runs/demo")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--fail-on", choices=list(_LEVELS), default="error", metavar="LEVEL",
                        help="exit with 1 if there is an error (default), a warning, a note; or never")  # fmt: skip
    args = parser.parse_args(argv)
    return run_main(lambda: _print_findings(args.run_dir, args.json, args.fail_on))


def _print_findings(run_dir: Path, as_json: bool, fail_on: str) -> int:
    findings = load_run(run_dir).doctor()
    print(
        json.dumps([vars(finding) for finding in findings], indent=2, ensure_ascii=False)
        if as_json
        else safe_text(repr(findings))
    )
    return int(any(_LEVELS[finding.severity] <= _LEVELS[fail_on] for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
