"""The command line of the doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict

import hpc.doctor
from hpc import cli
from hpc.doctor.check import Check
from hpc.doctor.examine import doctor

EXAMPLE = "python -m hpc.doctor @recipe.toml --partition gpu --nodes 4 --probe-nodes"
EXIT_CODES = "exit codes: 0 no problem found, 1 something would fail, 2 bad input"
_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    parser = cli.make_parser("hpc.doctor", hpc.doctor.__doc__, EXAMPLE, EXIT_CODES)
    parser.usage = "python -m hpc.doctor [--probe-nodes] [--json] [@RECIPE …] [flags of hpc.submit …]"
    parser.add_argument(
        "--probe-nodes", action="store_true", help="also check the nodes, in a job that takes a few seconds"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    own, rest = parser.parse_known_args(argv)
    checks = doctor(rest, own.probe_nodes)
    if own.json:
        cli.print_json([asdict(check) for check in checks])
    else:
        show(checks)
    return cli.EXIT_FAIL if any(check.level == "fail" for check in checks) else cli.EXIT_OK


def show(checks: list[Check]) -> None:
    """Print one line a check, and a last one that counts."""
    rows = [(_word(check), check.name, describe(check)) for check in checks]
    cli.print_table(("", "check", "what"), rows, _STYLES)
    count = {level: sum(check.level == level for check in checks) for level in ("ok", "warn", "fail")}
    print(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} that would fail")


def _word(check: Check) -> str:
    return "FAIL" if check.level == "fail" else check.level


def describe(check: Check) -> str:
    """The finding and, if it is not fine, the advice; in one line."""
    message = " ".join(check.message.split())
    return f"{message} → {check.advice}" if check.advice else message


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
