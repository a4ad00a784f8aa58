"""From a run directory to pandas: `from analysis import load_run; run = load_run("runs/demo")`.

Needs neither torch, SGLang nor Slurm, and no network. The columns of every frame, with their units, are
listed in `analysis/README.md`; the pictures are in `analysis.plots`, the numbers made from several frames
in `analysis.metrics`.
"""

from analysis._compare import Comparison, compare
from analysis._errors import DamagedFileError, DamagedFileWarning, RunNotFoundError
from analysis._groups import pass_at_k
from analysis._load import load_run, load_runs
from analysis._run import Run
from analysis._runs import Runs
from analysis._wandb import load_wandb

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
