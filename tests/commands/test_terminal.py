"""Text that is not ours steers no terminal, wherever it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import rich
from helpers.run_files import make_run

from analysis import DamagedFileWarning, doctor, load_run
from hpc import status
from hpc.runs.live_view import LiveView, PlainView, panel
from hpc.runs.progress import RunState
from hpc.runs.summary import print_summary
from rltrain.run.errors import UserError, run_main
from rltrain.run.files import append_event

HOSTILE = "reward: \x1b]0;owned\x07\x1b[2J\u202e\x9b2J"


@pytest.mark.parametrize(
    "where", ["error", "plain view", "live view", "panel", "summary", "table", "findings", "warning"]
)
def test_no_text_of_a_run_steers_the_terminal(
    where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = make_run(tmp_path, "x", phase="failed", steps=2, attempts=1)
    append_event(layout.events, 0, "checkpoint_failed", {"step": 2, "reason": HOSTILE})
    append_event(layout.events, 0, "attempt_finished", {"state": "failed", "reason": HOSTILE})
    if where == "error":
        run_main(lambda: _raise(UserError(HOSTILE)))
    elif where == "plain view":
        PlainView(layout, 2).say(HOSTILE)
    elif where == "live view":
        LiveView(layout, 2).say(HOSTILE)
    elif where == "panel":
        state = RunState(unsaved=HOSTILE)
        rich.print(panel("x", state, 2, 1.0))
    elif where == "summary":
        print_summary(layout, 2, 1.0)
    elif where == "table":
        status.main(["--runs-dir", str(tmp_path)])
    elif where == "findings":
        doctor.main([str(layout.root)])
    else:
        layout.metrics.write_text(layout.metrics.read_text() + HOSTILE + "\n")
        with pytest.warns(DamagedFileWarning) as warned:
            _ = load_run(layout.root).steps
        print(warned[0].message)
    out, err = capfd.readouterr()
    assert not set("\x1b\x07\u202e\x9b") & set(out + err)


def _raise(error: Exception) -> int:
    raise error
