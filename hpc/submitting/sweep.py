"""Sweeps: one command line, many runs that differ in some flags. Each is a run of its own.

    --sweep lr=1e-6,3e-6 seed=1,2        every combination: 4 runs
    --sweep variants.toml                a run for each table [[run]] of the file: flags, and perhaps a name
    --sweep variants.toml seed=1,2       every combination of both

On Slurm each run is a job of its own and not a task of a job array: heterogeneous jobs can't be in one, and a run has a
script, a supervisor, requeues and nodes to avoid of its own. `--sweep-parallel N` has at most N of them at a time.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain.arguments import flags as flag_data
from rltrain.arguments.flags import Flags
from rltrain.run.errors import UserError

MAX_NAME = 100  # characters of a run's name
_UNFIT = re.compile(r"[^A-Za-z0-9.]+")


@dataclass(frozen=True)
class Variant:
    """One run of a sweep: the suffix of its name, and its own flags."""

    name: str
    flags: Flags

    def __str__(self) -> str:
        return " ".join(
            [*flag_data.to_argv(self.flags), *(f"--{n} false" for n, v in self.flags.items() if v is None)]
        )


def read_variants(words: Sequence[str], base: str) -> list[Variant]:
    """The runs that the words of `--sweep` ask for, with their whole names.

    Args:
        words: `FLAG=VALUE,VALUE` or names of TOML files.
        base: name of the sweep.

    Raises:
        UserError: a word that is neither, a file that can't be read, a flag that comes twice.
    """
    axes = [_read_axis(word) if "=" in word else _read_file(word) for word in words]
    combined = [_combine(parts) for parts in itertools.product(*axes)]
    return _with_names(combined, base)


def _read_axis(word: str) -> list[Variant]:
    flag, _, values = word.removeprefix("--").partition("=")
    if not flag or not all(values.split(",")):
        raise UserError(f"--sweep {word}: FLAG=VALUE,VALUE is needed.")
    flag = flag if flag.startswith("slurm.env.") else flag.replace("_", "-")
    return [
        Variant(f"{flag.replace('_', '-')}-{value}", {flag: _value(value)}) for value in values.split(",")
    ]


def _value(word: str) -> list[str] | None:
    """As in a recipe: `true` is the bare flag, `false` takes it back."""
    return {"true": [], "false": None}.get(word, [word])


def _read_file(name: str) -> list[Variant]:
    path = Path(name).expanduser()
    try:
        tables = tomllib.loads(path.read_text())["run"]
    except OSError as error:
        raise UserError(
            f"--sweep {name}: {error.strerror}. FLAG=VALUE,VALUE or the name of a TOML file is needed."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--sweep {name} is not valid TOML: {error}.") from None
    except KeyError:
        tables = None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"--sweep {name}: tables [[run]] are needed, each with the flags of a run.")
    return [_read_table(dict(table), f"{name}, run {i}", i) for i, table in enumerate(tables, 1)]


def _read_table(table: dict[str, object], source: str, number: int) -> Variant:
    name = str(table.pop("name", number))
    return Variant(name, flag_data.from_table(table, source))


def _combine(parts: Sequence[Variant]) -> Variant:
    counts = Counter(flag for part in parts for flag in part.flags)
    if twice := [flag for flag, count in counts.items() if count > 1]:
        raise UserError(f"--sweep has --{twice[0]} in more than one place.")
    return Variant("_".join(part.name for part in parts), flag_data.merge(*(part.flags for part in parts)))


def _with_names(variants: list[Variant], base: str) -> list[Variant]:
    """Names by flags and values; numbers where these are too long, or the same for two runs."""
    names = [
        f"{base}." + "_".join(_UNFIT.sub("-", word).strip("-") for word in each.name.split("_"))
        for each in variants
    ]
    if len(set(names)) < len(names) or max(map(len, names)) > MAX_NAME:
        names = [f"{base}.{number:03d}" for number in range(1, len(names) + 1)]
    return [Variant(name, each.flags) for name, each in zip(names, variants, strict=True)]
