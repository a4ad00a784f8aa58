"""The command line of `submit`: options of its own, recipes, and training flags.

`@recipe.toml` words (files, or names of built-in recipes such as `@demo`) are merged from left to right, then
the flags of the command line.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import NoReturn

from hpc.planning import slurm_tables
from hpc.planning.request import PLACEMENTS, Request, SubmitOptions
from hpc.planning.slurm_tables import SlurmTables
from rltrain import arguments
from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.arguments.recipes import builtin_recipes, read_recipe
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.run.toml_values import read_table

USAGE = "python -m hpc.submit [@RECIPE …] [--FLAG VALUE …]"

_NAMELESS = ("recipe", "config")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# Training flags that the built-in demo takes.
FOR_DEMO = ("colocate",)


# Options that act on a Slurm job and on nothing else.
_OF_JOBS = (
    *("nodes", "placement", "account", "qos", "time", "gpu-type", "after", "detach", "test-only", "template"),
    *("max-restarts", "max-failures"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_submit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the options of `submit` itself."""
    add = parser.add_argument_group("submit").add_argument
    add("--name", metavar="NAME", help="name of the run and its directory; an existing run is resumed"
        " (default: the last recipe's name, or its folder's for a recipe.toml)")  # fmt: skip
    add(
        "--runs-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="directory of the runs (default: ./runs)",
    )
    add("--dry-run", action="store_true", help="print what would run; write nothing")
    add("--share", action="store_true", help="let your group read the run directory (default: only you)")
    add("--sweep", nargs="+", default=(), metavar="FLAG=A,B", help="one run for each combination of values;"
        " or a TOML file with tables [[run]] of flags")  # fmt: skip
    add(
        "--sweep-parallel",
        type=int,
        metavar="N",
        help="runs of a sweep at a time (default: all on Slurm, else 1)",
    )
    add("--max-engine-restarts", type=int, default=3, metavar="N",
        help="restarts of an engine, or the router, that died within an attempt (default: 3)")  # fmt: skip
    add = parser.add_argument_group("Slurm").add_argument
    add("--partition", metavar="NAME", help="Slurm partition (default: run on this machine)")
    add("--nodes", type=int, metavar="N", help="nodes to ask for: half of them train, half of them generate"
        " (default: what the cluster flags below need)")  # fmt: skip
    add("--placement", choices=PLACEMENTS, help="het: each role its own part of a heterogeneous job; plain: one"
        " allocation, split by nodes; colocated: roles share nodes (default: het; one node: colocated)")  # fmt: skip
    add("--account", metavar="NAME", help="account to charge")
    add("--qos", metavar="NAME", help="quality of service")
    add("--time", metavar="LIMIT", help="time limit, as for sbatch: 4:00:00, 2-0 (default: the partition's)")
    add("--gpu-type", metavar="NAME", help="type of GPU (default: any)")
    add(
        "--after",
        nargs="+",
        default=(),
        metavar="JOB",
        help="start when these jobs or runs have succeeded",
    )
    add("--detach", action="store_true", help="return when submitted, instead of showing the run")
    add("--test-only", action="store_true", help="let sbatch check the job; submit nothing")
    add(
        "--template",
        type=Path,
        metavar="FILE",
        help="Jinja template of the batch script; it may extend job.sbatch.j2",
    )
    add("--max-restarts", type=int, default=100, metavar="N", help="requeues in all (default: 100)")
    add("--max-failures", type=int, default=1, metavar="N",
        help="failed attempts in a row without a new checkpoint (default: 1)")  # fmt: skip
    add("--chain", type=int, default=0, metavar="N", help="submit N spare jobs too, each of which takes over when"
        " the one before it has ended for any reason (default: 0)")  # fmt: skip


def full_parser() -> argparse.ArgumentParser:
    """A parser with every flag, for `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m hpc.submit",
        usage=USAGE,
        description="Train a language model by reinforcement learning, on Slurm or on this machine."
        " Without training flags or a recipe it runs the built-in demo.",
        epilog="A recipe is a TOML file of flags (lr = 1e-3); @NAME is a file or one of: "
        + ", ".join(f"@{name}" for name in builtin_recipes()),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    add_submit_flags(parser)
    arguments.add_flags(parser)
    return parser


def read_request(argv: list[str], last_word: Flags | None = None) -> Request:
    """Read a command line and the recipes that it names; the flags `last_word` replace what they say.

    Raises:
        UserError: an unknown flag (with the nearest known one), an unreadable recipe, a bad name.
    """
    recipes, given = flag_data.split(argv)
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_submit_flags(parser)
    own = {option.removeprefix("--") for option in parser._option_string_actions}
    known = own | {option.removeprefix("--") for option in arguments.known_flags()}
    merged = flag_data.merge(*(read_recipe(recipe, known) for recipe in recipes), given, last_word or {})
    slurm = {name: values for name, values in merged.items() if name.startswith(slurm_tables.PREFIX)}
    merged = {name: values for name, values in merged.items() if name not in slurm}
    for name in merged:
        if name == "array":
            raise UserError(
                "--array: each run is a job of its own; --sweep FLAG=A,B submits one for every value."
            )
        if name not in known:
            raise UserError(arguments.explain_unknown(f"--{name}", sorted(f"--{flag}" for flag in known)))
    parsed = parser.parse_args(flag_data.to_argv({name: merged[name] for name in merged if name in own}))
    parsed.is_named = parsed.name is not None
    parsed.recipes = tuple(_place(recipe) for recipe in recipes)
    has_train_flags = any(name not in own and name not in FOR_DEMO for name in merged)
    parsed.name = _check_name(parsed.name or _default_name(recipes, has_train_flags))
    parsed.runs_dir = parsed.runs_dir.expanduser().absolute()
    parsed.after, parsed.sweep = tuple(parsed.after), tuple(parsed.sweep)
    if parsed.template:
        parsed.template = parsed.template.expanduser().absolute()
    for name, least in (("nodes", 1), ("sweep_parallel", 1), ("max_engine_restarts", 0)):
        value = getattr(parsed, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}.")
    train = {name: values for name, values in merged.items() if name not in own}
    if key := train.get("wandb-key"):  # to where W&B looks for it: flags are stored with the run
        os.environ["WANDB_API_KEY"] = key[-1]
        del train["wandb-key"]
    return Request(options=SubmitOptions(**vars(parsed), slurm=slurm_tables.read(slurm)), train=train)


def refuse_without_partition(argv: list[str], options: SubmitOptions) -> None:
    """Refuse a command line that is meant for Slurm and lacks the partition: the run would start on this machine.

    What recipes say of Slurm is left alone, because the same recipe runs on a laptop too.

    Raises:
        UserError: it has options of Slurm jobs, and no recipe names a partition either.
    """
    given = flag_data.split(argv)[1]
    of_jobs = [f"--{name}" for name in given if name in _OF_JOBS or name.startswith(slurm_tables.PREFIX)]
    if options.partition is None and of_jobs:
        raise UserError(
            f"{', '.join(of_jobs)}: only for a job on Slurm, but there is no --partition, so the run would start on"
            " this machine. Give --partition NAME (`sinfo -s` lists them), or leave this out to run here."
        )


def stored_options(layout: RunLayout) -> SubmitOptions:
    """The options that a run was last submitted with.

    Raises:
        UserError: its configuration is damaged.
        OSError: there is no such run, or it can't be read.
    """
    table = read_table(layout, "submit", missing={})
    slurm = table.pop("slurm", {})
    slurm = SlurmTables(**{**slurm, "setup": tuple(slurm.get("setup", ()))})
    table["recipes"] = tuple(table.get("recipes", ()))
    template = Path(table.pop("template")) if "template" in table else None
    return SubmitOptions(layout.name, layout.root.parent, template=template, slurm=slurm, **table)


def _place(recipe: str) -> str:
    """A recipe's file, or its name if it is built in."""
    path = Path(recipe).expanduser()
    return str(path.resolve()) if path.is_file() else f"@{recipe}"


def _default_name(recipes: list[str], has_train_flags: bool) -> str:
    if recipes:
        path = Path(recipes[-1]).expanduser()
        name = path.name.removesuffix(".toml")
        # A file that is only called a recipe does not say what is trained; its folder does.
        folder = path.resolve().parent.name if path.is_file() else ""
        return folder if name in _NAMELESS and _RUN_NAME.fullmatch(folder) else name
    return time.strftime("run-%Y%m%d-%H%M%S") if has_train_flags else "demo"


def _check_name(name: str) -> str:
    if not _RUN_NAME.fullmatch(name) or len(name) > 100:
        raise UserError(
            f"--name {name!r}: a run's name has letters, digits, '.', '_' and '-', begins with a letter or a"
            " digit, and is at most 100 characters long."
        )
    return name
