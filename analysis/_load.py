"""Find runs: `load_run` of one directory, `load_runs` of many; who asks for none is told what is nearby."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable
from pathlib import Path

from analysis._errors import RunNotFoundError
from analysis._run import Run
from analysis._runs import Runs
from analysis._source import DirectorySource
from hpc.layout import RunLayout

_MAX_SUGGESTIONS = 8


def load_run(path: str | Path, *, strict: bool = False) -> Run:
    """The run in directory `path`, finished or live. Nothing large is read before it is asked for.

    Args:
        path: the run's directory, for example `runs/demo`.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: there is no run in `path`; the message lists the runs nearby.
    """
    path = Path(path).expanduser()
    if not _is_run(path):
        raise RunNotFoundError(_not_found_message(path))
    return Run(DirectorySource(path, strict), strict=strict)


def load_runs(paths: str | Path | Iterable[str | Path], *, strict: bool = False) -> Runs:
    """Several runs at once.

    Args:
        paths: a pattern such as `"runs/lr-*"`, a directory of runs, or several of either.
        strict: a damaged file is an error, not a warning.

    Raises:
        RunNotFoundError: nothing found.
    """
    wanted = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, Path] = {}
    for pattern in map(str, wanted):
        places = [Path(place) for place in sorted(glob.glob(str(Path(pattern).expanduser())))]  # noqa: PTH207
        for place in places:
            runs = (
                [place] if _is_run(place) else sorted(child for child in _children(place) if _is_run(child))
            )
            found |= {run.resolve(): run for run in runs}
    if not found:
        raise RunNotFoundError(_not_found_message(Path(str(wanted[0]) if wanted else "runs")))
    return Runs([load_run(path, strict=strict) for path in found.values()])


def _is_run(path: Path) -> bool:
    layout = RunLayout(path)
    marks = [layout.run_json, layout.config, layout.metrics, layout.events, layout.rollouts]
    return any(mark.exists() for mark in marks)


def _not_found_message(path: Path) -> str:
    problem = "holds no run" if path.is_dir() else "does not exist"
    nearby = _nearby_runs(path)
    if not nearby:
        return (
            f"{path} {problem}, and there is no run beside it. A run is the directory that a job writes to."
        )
    names = [str(run) for run in nearby]
    nearest = difflib.get_close_matches(str(path), names, n=_MAX_SUGGESTIONS, cutoff=0.6)
    listed = list(dict.fromkeys([*nearest, *names]))
    more = f" and {len(listed) - _MAX_SUGGESTIONS} more" if len(listed) > _MAX_SUGGESTIONS else ""
    return f"{path} {problem}. Runs nearby: {', '.join(listed[:_MAX_SUGGESTIONS])}{more}."


def _nearby_runs(path: Path) -> list[Path]:
    """Runs beside and below `path`, and in `runs/` here; the newest first."""
    existing = next((parent for parent in path.parents if parent.is_dir()), Path())
    places = [path, existing, existing / "runs", Path("runs")]
    found = {run.resolve(): run for place in places for run in _children(place) if _is_run(run)}
    return sorted(found.values(), key=lambda run: run.stat().st_mtime, reverse=True)


def _children(place: Path) -> list[Path]:
    try:
        return [child for child in place.iterdir() if child.is_dir()]
    except OSError:
        return []
