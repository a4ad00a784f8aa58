"""From a run directory to pandas: `from analysis import load_run; run = load_run("runs/demo")`.

Needs neither torch, SGLang nor Slurm, and no network. The columns of every frame, with their units, are
listed in `analysis/README.md`; the pictures are in `analysis.plots`, the numbers made from several frames
in `analysis.metrics`.
"""

from analysis.frames.compare import Comparison, compare
from analysis.frames.samples import pass_at_k
from analysis.reading.errors import DamagedFileError, DamagedFileWarning, RunNotFoundError
from analysis.run import Run, load_run, load_wandb
from analysis.runs import Runs, load_runs

__all__ = [
    "Comparison",
    "DamagedFileError",
    "DamagedFileWarning",
    "Run",
    "RunNotFoundError",
    "Runs",
    "compare",
    "load_run",
    "load_runs",
    "load_wandb",
    "pass_at_k",
]
