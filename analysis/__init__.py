"""From a run directory to pandas: `from analysis import load_run; run = load_run("runs/demo")`.

Needs neither torch, SGLang nor Slurm, and no network. The columns of every frame, with their units, are
listed in `analysis/README.md`; the pictures are in `analysis.plots`.
"""

from analysis._errors import DamagedFileError, DamagedFileWarning, RunNotFoundError
from analysis._run import Run, load_run

__all__ = ["DamagedFileError", "DamagedFileWarning", "Run", "RunNotFoundError", "load_run"]
