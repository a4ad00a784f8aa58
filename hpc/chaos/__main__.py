"""Storms of faults over runs on a real Slurm of this machine: `python -m hpc.chaos --seed 1 --storms 10`.

Each storm submits a run of stand-ins (small programs that do things in the order of a real run), does faults to it that
are drawn with the seed, and judges what is left. A storm that finds something is repeated with fewer faults and printed
as the command that repeats it.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hpc import cli
from hpc.chaos.faults import KINDS, Fault, draw, parse
from hpc.chaos.isolated import PREFIX, disk_for_runs, is_isolated, isolate
from hpc.chaos.operator import NoClusterError, bring_up, wait_for_nodes
from hpc.chaos.recovery import table
from hpc.chaos.shrink import shrink
from hpc.chaos.soak import Watcher, judge
from hpc.chaos.storm import TO_END_SECONDS, WANDB_OFFLINE, WANDB_SILENT, Outcome, Storm
from hpc.sandbox import ClusterSpec, Sandbox
from hpc.slurm.client import SlurmUnavailableError
from rltrain.run.errors import UserError

EXAMPLE = "python -m hpc.chaos --seed 1 --storms 10"
EXIT_BROKE_OFF = 3
EXIT_CODES = (
    "exit codes: 0 nothing found, 1 something found, 2 bad input,"
    f" {EXIT_BROKE_OFF} Slurm did not come up or stopped answering"
)
# A refusal of sbatch's is not among them: it may be the run that asks for nonsense.
_BROKE_OFF = (NoClusterError, SlurmUnavailableError)
# After which a run counts as stuck: most faults begin an attempt, which takes a busy machine half a minute.
_LEAST_TIMEOUT, _SECONDS_OF_A_FAULT = 600.0, 60.0
_TO_END = f"{TO_END_SECONDS / 60:.0f} minutes"
_LEAST_SECONDS = 60.0  # left, for a storm to begin
_MAX_BROKEN = 2  # storms that Slurm itself ended
_IDLE_SECONDS = 120.0  # for the nodes of one storm to be there for the next
# Files and bytes that a run directory may get a step, beside its results: lines of metrics and logs, W&B's records.
_GROWTH, _GROWTH_OF_REAL = (0.0, 1000.0), (2.0, 20_000.0)


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `_parser` says what each is."""

    seed: int
    storms: int
    faults: int
    steps: int
    nodes: int | None
    minutes: float | None
    no_shrink: bool
    confirm: bool
    repeat: list[str] | None
    soak: int | None
    real: bool


def main(argv: list[str]) -> int:
    """The command line; returns an exit code."""
    args = Options(**vars(_parser().parse_args(argv)))
    isolate(["-m", "hpc.chaos", *argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left behind
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        directory = Path(name)
        directory.chmod(0o755)
        spec = ClusterSpec(nodes=4, cpu_nodes=0, gpus=1, networks=is_isolated())
        cluster = Sandbox(directory / "slurm", spec, owner_pid=os.getpid())
        with disk_for_runs(directory) as runs:
            try:
                bring_up(cluster)
                return soak(cluster, runs, args.soak, args) if args.soak else weather(cluster, runs, args)
            except _BROKE_OFF as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                return EXIT_BROKE_OFF
            finally:
                cluster.down()


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("hpc.chaos", __doc__, EXAMPLE, EXIT_CODES)
    listed = "\n".join(f"  {name:19}{kind.what}" for name, kind in KINDS.items())
    parser.epilog = f"{parser.epilog}\n\nfaults:\n{listed}"
    parser.add_argument("--seed", type=int, default=0, help="seed of the first storm (%(default)s)")
    parser.add_argument(
        "--storms", type=int, default=1, help="number of storms, each with the next seed (%(default)s)"
    )
    parser.add_argument("--faults", type=int, default=8, help="faults per storm (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps that each run trains (%(default)s)")
    parser.add_argument(
        "--nodes", type=int, choices=(3, 4), help="nodes of each run (4; 3 for storms with an odd seed)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"start no storm or fault after this time; everything has ended {_TO_END} later",
    )
    parser.add_argument("--no-shrink", action="store_true", help="do not look for fewer faults")
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="repeat a storm that finds something; it counts if the repeat finds something too (even after --minutes)",
    )
    parser.add_argument("--repeat", nargs="+", metavar="FAULT", help="one storm of these faults")
    parser.add_argument(
        "--soak", type=int, metavar="STEPS", help="one long run instead of storms: what grows?"
    )
    parser.add_argument(
        "--real", action="store_true", help="real engines and a real trainer of the demo's tiny model"
    )
    return parser


def soak(cluster: Sandbox, runs: Path, steps: int, args: Options) -> int:
    """One long run, and what of it grows."""
    timeout = 120.0 + steps * (10.0 if args.real else 1.0)
    run = Storm(cluster, runs, "soak", steps, timeout, real=_files(runs, args), flags=WANDB_OFFLINE)
    with Watcher(run.run_dir) as watcher:
        outcome = run.run(())
    lines, grown = judge(watcher.growth, *(_GROWTH_OF_REAL if args.real else _GROWTH))
    print("\n".join(lines))
    problems = [*outcome.problems, *grown]
    print(f"{steps} steps in {outcome.seconds:.0f} s: {'ok' if not problems else 'FOUND'}")
    for problem in problems:
        print(f"  {problem}", flush=True)
    return 1 if problems else 0


def _files(runs: Path, args: Options) -> Path | None:
    """What a real run needs; None for one of stand-ins."""
    if not args.real:
        return None
    os.environ["OMP_NUM_THREADS"] = "1"  # a machine has fewer processors than its nodes claim
    directory = runs.parent / "demo-data"
    if not directory.exists():
        subprocess.run([sys.executable, "-m", "rltrain.demo.assets", str(directory)], check=True)
    return directory


def weather(cluster: Sandbox, runs: Path, args: Options) -> int:
    """Run the storms that were asked for."""
    bad, broken = 0, 0
    outcomes: list[Outcome] = []
    until = time.monotonic() + args.minutes * 60 if args.minutes else math.inf
    asked = 1 if args.repeat else args.storms
    for seed in range(args.seed, args.seed + asked):
        if broken == _MAX_BROKEN or (outcomes and time.monotonic() > until - _LEAST_SECONDS):
            break
        faults = parse(args.repeat) if args.repeat else draw(seed, args.faults, args.steps, real=args.real)
        try:
            wait_for_nodes(cluster, _IDLE_SECONDS)
            if args.real:
                bad += _run_undisturbed(cluster, runs, seed, args)
            outcome = _weathered(
                _storm(cluster, runs, f"storm-{seed}", seed, args, len(faults)), faults, until
            )
            outcomes.append(outcome)
            _report(f"storm {seed}", outcome)
            if outcome.problems and _counts(cluster, runs, seed, faults, args):
                bad += 1
                _find_fewer(cluster, runs, seed, outcome, args, until)
        except _BROKE_OFF as error:
            print(f"storm {seed} broke off: {error}", flush=True)
            broken += 1
    _summary(outcomes, asked, bad, broken)
    return 1 if bad else EXIT_BROKE_OFF if broken else 0


def _weathered(storm: Storm, faults: tuple[Fault, ...], until: float) -> Outcome:
    """What becomes of a storm. An error for people is a finding, unless Slurm is gone: they asked for nothing odd."""
    try:
        return storm.run(faults, until)
    except _BROKE_OFF:
        raise
    except UserError as error:
        return Outcome(faults, 0, 0, 0.0, (), (f"{type(error).__name__}: {error}",))


def _counts(cluster: Sandbox, runs: Path, seed: int, faults: tuple[Fault, ...], args: Options) -> bool:
    """Whether what a storm has found counts: with `--confirm` only if it finds something again, at once."""
    if not args.confirm:
        return True
    wait_for_nodes(cluster, _IDLE_SECONDS)
    again = _weathered(
        _storm(cluster, runs, f"storm-{seed}-again", seed, args, len(faults)), faults, math.inf
    )
    _report(f"storm {seed} again", again)
    if not again.problems:
        print(f"storm {seed}: not found again", flush=True)
    return bool(again.problems)


def _storm(cluster: Sandbox, runs: Path, name: str, seed: int, args: Options, faults: int) -> Storm:
    timeout = 3600.0 if args.real else max(_LEAST_TIMEOUT, faults * _SECONDS_OF_A_FAULT)
    nodes = _nodes(seed, args)
    undisturbed = runs / _undisturbed_name(nodes)
    return Storm(
        cluster,
        runs,
        name,
        args.steps,
        timeout,
        nodes,
        _files(runs, args),
        WANDB_SILENT if _has_silent_wandb(seed, args) else None,
        undisturbed=undisturbed if undisturbed.exists() else None,
    )


def _undisturbed_name(nodes: int) -> str:
    return f"undisturbed-{nodes}-nodes"


def _run_undisturbed(cluster: Sandbox, runs: Path, seed: int, args: Options) -> bool:
    """What a storm's run is compared with: one run for each number of nodes. True if something is wrong with it, and
    nothing is compared with it."""
    name = _undisturbed_name(_nodes(seed, args))
    if (runs / name).exists():
        return False
    outcome = _weathered(_storm(cluster, runs, name, seed, args, 0), (), math.inf)
    print(f"{name}: {args.steps} steps in {outcome.seconds:.0f} s {' '.join(outcome.problems)}", flush=True)
    if outcome.problems and (runs / name).exists():
        (runs / name).rename(runs / f"{name}-of-{seed}")
    return bool(outcome.problems)


def _has_silent_wandb(seed: int, args: Options) -> bool:
    """Whether W&B does not answer in this storm: in one of four with stand-ins."""
    return not args.real and seed % 4 == 3


def _nodes(seed: int, args: Options) -> int:
    return args.nodes or (3 if seed % 2 and not args.repeat else 4)


def _find_fewer(
    cluster: Sandbox, runs: Path, seed: int, outcome: Outcome, args: Options, until: float
) -> None:
    tried = iter(range(1000))

    def fails(faults: tuple[Fault, ...]) -> bool:
        if time.monotonic() > until - _LEAST_SECONDS:
            return False
        wait_for_nodes(cluster, _IDLE_SECONDS)
        name = f"storm-{seed}-shrunk-{next(tried)}"
        storm = _storm(cluster, runs, name, seed, args, len(faults))
        return bool(_weathered(storm, faults, until).problems)

    faults = outcome.faults if args.no_shrink or args.repeat else shrink(outcome.faults, fails)
    words = shlex.join(
        [
            *(["--real"] if args.real else []),
            f"--steps={args.steps}",
            f"--nodes={_nodes(seed, args)}",
            *([f"--seed={seed}"] if _has_silent_wandb(seed, args) else []),
            "--repeat",
            *map(str, faults),
        ]
    )
    print(f"  again: python -m hpc.chaos {words}", flush=True)


def _report(name: str, outcome: Outcome) -> None:
    ending = "FOUND" if outcome.problems else "not judged" if outcome.unjudged else "ok"
    print(
        f"{name}: {outcome.done} of {len(outcome.faults)} faults met somebody, {outcome.hands} resubmitted,"
        f" {outcome.seconds:.0f} s: {ending}   {' '.join(map(str, outcome.faults))}",
        flush=True,
    )
    times = (f"{each.fault} {each.seconds:.1f} s (least {each.least:.1f})" for each in outcome.recoveries)
    print(f"  the next step came after: {', '.join(times)}", flush=True)
    if outcome.kept:
        print(f"  {outcome.kept}", flush=True)
    for problem in (*outcome.problems, *filter(None, [outcome.unjudged])):
        print(f"  {problem}", flush=True)
    for event in outcome.events:
        print(f"    {event}", flush=True)


def _summary(outcomes: list[Outcome], asked: int, bad: int, broken: int) -> None:
    done = sum(outcome.done for outcome in outcomes)
    unjudged = sum(bool(outcome.unjudged) for outcome in outcomes)
    more = f", {unjudged} not judged" if unjudged else ""
    more += f", {broken} broke off" if broken else ""
    print(f"{len(outcomes)} of {asked} storms, {done} faults, {bad} storms found something{more}")
    print("\n".join(table([each for outcome in outcomes for each in outcome.recoveries])), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
