"""Where a run is read from: a run directory, or W&B (`_wandb.py`, `_wandb_online.py`)."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from analysis._errors import damaged
from analysis._frames import metric_rows
from analysis._jsonl import read_jsonl, read_jsonl_frame
from hpc.layout import RunLayout

Rows = list[dict[str, Any]]


class Source(Protocol):
    """What a run is made of, as recorded."""

    @property
    def name(self) -> str:
        """The run's name."""

    @property
    def path(self) -> Path | str:
        """Where it is, for people."""

    @property
    def layout(self) -> RunLayout | None:
        """The run directory with the samples, if there is one."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration by section."""

    @property
    def info(self) -> dict[str, Any]:
        """Identity: creation time, git commit, package versions, W&B id."""

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step in the order of writing, perhaps several of one step."""

    @property
    def events(self) -> Rows:
        """One mapping an event."""


@dataclass(frozen=True)
class DirectorySource:
    """A run directory, finished or live."""

    root: Path
    strict: bool = False

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.layout.name

    @property
    def path(self) -> Path:
        """The directory."""
        return self.root

    @property
    def layout(self) -> RunLayout:
        """The paths below it."""
        return RunLayout(self.root)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.toml`; empty before it is written."""
        try:
            return tomllib.loads(self.layout.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            damaged(self.layout.config, str(error), strict=self.strict)
            return {}

    @cached_property
    def info(self) -> dict[str, Any]:
        """`run.json`, with what `status.json` says as `status`."""
        return {**self._object(self.layout.run_json), "status": self._object(self.layout.status)}

    @property
    def metrics(self) -> pd.DataFrame:
        """Lines of `metrics.jsonl`."""
        return metric_rows(read_jsonl_frame(self.layout.metrics, strict=self.strict))

    @property
    def events(self) -> Rows:
        """Lines of `events.jsonl`."""
        return read_jsonl(self.layout.events, strict=self.strict)

    def _object(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            damaged(path, str(error), strict=self.strict)
            return {}
        return content if isinstance(content, dict) else {}
