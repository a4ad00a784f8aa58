"""Storms of faults over runs on a real Slurm of this machine: `python -m hpc.chaos --seed 1 --storms 10`.

Each storm submits a run of stand-ins (small programs that do things in the order of a real run), does faults to it that
are drawn with the seed, and judges what is left. A storm that finds something is repeated with fewer faults and printed
as the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hpc import cli
from hpc.chaos.faults import KINDS, Fault, draw, parse
from hpc.chaos.shrink import shrink
from hpc.chaos.storm import Outcome, Storm
from hpc.sandbox import ClusterSpec, Sandbox

EXAMPLE = "python -m hpc.chaos --seed 1 --storms 10"
EXIT_CODES = "exit codes: 0 nothing found, 1 something found, 2 bad input"


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    return weather(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("hpc.chaos", __doc__, EXAMPLE, EXIT_CODES)
    listed = "\n".join(f"  {name:19}{kind.what}" for name, kind in KINDS.items())
    parser.epilog = f"{parser.epilog}\n\nfaults:\n{listed}"
    parser.add_argument("--seed", type=int, default=0, help="of the first storm (%(default)s)")
    parser.add_argument(
        "--storms", type=int, default=1, help="how many, each with the next seed (%(default)s)"
    )
    parser.add_argument("--faults", type=int, default=8, help="a storm (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="that each run trains (%(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no storm after this time")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for fewer faults")
    parser.add_argument("--repeat", nargs="+", metavar="FAULT", help="one storm of these faults")
    return parser


def weather(args: argparse.Namespace) -> int:
    """Run the storms that were asked for."""
    begun, bad, outcomes = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory(prefix="slurmlime-chaos-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        spec = ClusterSpec(nodes=4, cpu_nodes=0, gpus=1)
        with Sandbox(root / "slurm", spec, owner_pid=os.getpid()) as cluster:
            for seed in range(args.seed, args.seed + (1 if args.repeat else args.storms)):
                if args.minutes and time.monotonic() - begun > args.minutes * 60:
                    break
                faults = parse(args.repeat) if args.repeat else draw(seed, args.faults, args.steps)
                outcome = Storm(cluster, root / "runs", f"storm-{seed}", args.steps).run(faults)
                outcomes.append(outcome)
                _report(seed, outcome)
                if outcome.problems:
                    bad += 1
                    _find_fewer(cluster, root, seed, outcome, args)
    _summary(outcomes, bad)
    return 1 if bad else 0


def _find_fewer(cluster: Sandbox, root: Path, seed: int, outcome: Outcome, args: argparse.Namespace) -> None:
    tried = iter(range(1000))

    def fails(faults: tuple[Fault, ...]) -> bool:
        name = f"storm-{seed}-shrunk-{next(tried)}"
        return bool(Storm(cluster, root / "runs", name, args.steps).run(faults).problems)

    faults = outcome.faults if args.no_shrink or args.repeat else shrink(outcome.faults, fails)
    words = shlex.join([f"--steps={args.steps}", "--repeat", *map(str, faults)])
    print(f"  again: python -m hpc.chaos {words}", flush=True)


def _report(seed: int, outcome: Outcome) -> None:
    ending = "ok" if not outcome.problems else "FOUND"
    print(
        f"storm {seed}: {outcome.done} of {len(outcome.faults)} faults met somebody, {outcome.hands} resubmitted,"
        f" {outcome.seconds:.0f} s: {ending}   {' '.join(map(str, outcome.faults))}",
        flush=True,
    )
    for problem in outcome.problems:
        print(f"  {problem}", flush=True)


def _summary(outcomes: list[Outcome], bad: int) -> None:
    recoveries = [seconds for outcome in outcomes for seconds in outcome.recoveries]
    done = sum(outcome.done for outcome in outcomes)
    print(f"{len(outcomes)} storms, {done} faults, {bad} storms found something")
    if recoveries:
        print(
            f"without a step after a fault: median {statistics.median(recoveries):.1f} s,"
            f" longest {max(recoveries):.1f} s"
        )


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
