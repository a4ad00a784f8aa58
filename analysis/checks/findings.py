"""Findings of `run.doctor()`: what deserves a look, with evidence and advice, for people and scripts."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

ERROR, WARNING, NOTE = "error", "warning", "note"
_ORDER = [ERROR, WARNING, NOTE]


@dataclass(frozen=True)
class Finding:
    """Something that deserves a look.

    Attributes:
        name: stable, for scripts.
        severity: "error", "warning" or "note".
        evidence: the numbers.
        plot: function of `analysis.plots` that shows it.
        advice: what to do.
        samples: which samples it is about, as a page's filters say it (`status=failed`); empty for none.
    """

    name: str
    severity: str
    evidence: str
    plot: str
    advice: str
    samples: str = ""


class Findings(Sequence[Finding]):
    """Findings, the worst first."""

    def __init__(self, run_name: str, found: Sequence[Finding]) -> None:
        self.run_name = run_name
        self._found = sorted(found, key=lambda finding: _ORDER.index(finding.severity))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, key: int) -> Finding:  # type: ignore[override]
        return self._found[key]

    def to_frame(self) -> pd.DataFrame:
        """One row a finding."""
        return pd.DataFrame([vars(finding) for finding in self._found], columns=list(Finding.__annotations__))

    def __repr__(self) -> str:
        if not self._found:
            return f"{self.run_name}: nothing found"
        lines = [
            f"{finding.severity}: {finding.name}\n  {finding.evidence}\n  {finding.advice} (plots.{finding.plot})"
            for finding in self._found
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        if not self._found:
            return f"<b>{html.escape(self.run_name)}</b>: nothing found"
        table = self.to_frame().to_html(index=False, escape=True)
        return f"<b>{html.escape(self.run_name)}</b>{table}"


def ends(values: pd.Series) -> tuple[float, float]:
    """Means of the first and of the last sixth of a metric's values."""
    part = max(1, len(values) // 6)
    return float(values.iloc[:part].mean()), float(values.iloc[-part:].mean())
