"""Runs of several people in one directory: what may not be read is named and left out; --share."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.run_files import make_run

from analysis import DamagedFileWarning, RunNotFoundError, load_run, load_runs, sample
from hpc import logs, status
from hpc.submitting.command_line import read_request
from rltrain.run.errors import UserError, run_main
from rltrain.run.files import others_may_write, own_file, share, share_like

_NOBODY = 65534


@contextmanager
def runs_with_a_private_one() -> Iterator[Path]:
    """Runs `mine` and `hers`; the block runs as another user than the one to whom `hers` belongs."""
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name)
        for run in ("mine", "hers"):
            make_run(runs, run, phase="finished", steps=2, attempts=1)
        (runs / "mine").chmod(0o755)
        (runs / "hers").chmod(0o700 if os.geteuid() == 0 else 0)
        runs.chmod(0o755)
        try:
            with _another_user():
                yield runs
        finally:
            (runs / "hers").chmod(0o700)


@contextmanager
def _another_user() -> Iterator[None]:
    if os.geteuid() != 0:  # nobody else's mode 0 may be passed by but root's
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_private_run_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with runs_with_a_private_one() as runs:
        assert [run.name for run in status.status(runs_dir=runs)] == ["mine"]
        assert status.main(["--runs-dir", str(runs)]) == 0
        assert capsys.readouterr().err == "skipped (no permission to read): hers\n"
        with pytest.raises(UserError, match=r"may not read .*hers: it belongs to .*--share"):
            logs.main(["hers", "--runs-dir", str(runs)])


def test_a_private_run_is_left_out_of_frames(capsys: pytest.CaptureFixture[str]) -> None:
    with runs_with_a_private_one() as runs:
        for pattern in (runs, runs / "*"):
            with pytest.warns(DamagedFileWarning, match=r"no permission to read\): .*hers"):
                assert [run.name for run in load_runs(pattern)] == ["mine"]
        with pytest.raises(RunNotFoundError, match="belongs to"):
            load_run(runs / "hers")
        assert sample.main([str(runs / "hers")]) == 2
        assert "you may not read" in capsys.readouterr().err


def test_what_may_not_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with runs_with_a_private_one() as runs:
        place = runs / "mine" / "plots"
        assert run_main(lambda: place.mkdir()) == 2
    assert capsys.readouterr().err.startswith(f"error: {place}: you may not read or write this")


def test_a_file_where_a_directory_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x", tmp_path):
        assert run_main(lambda place=place: place.write_text("")) == 2
        assert capsys.readouterr().err.startswith(f"error: {place}: ")


def test_share(tmp_path: Path) -> None:
    """The group reads what is there and what comes; others read nothing; a run that is not shared stays private."""
    assert read_request(["--name=x", "--share"]).options.share
    layout = make_run(tmp_path, "x", phase="stopped", steps=2, attempts=1)
    layout.root.chmod(0o700)
    layout.metrics.chmod(0o600)
    before = os.umask(0o077)
    try:
        share_like(layout.root)
        assert os.umask(0o077) == 0o077
        share(layout.root)
        share_like(layout.root)
        (layout.root / "new").touch()
    finally:
        os.umask(before)
    before = os.umask(0o002)
    try:  # what is not shared is not written by others either
        layout.root.chmod(0o700)
        share_like(layout.root)
        assert os.umask(before) == 0o022
        layout.root.chmod(0o750)
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (layout.root, layout.metrics, layout.root / "new")
    }
    assert modes == {"x": 0o750, "metrics.jsonl": 0o640, "new": 0o640}


def test_what_others_may_have_written_is_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    user = pwd.getpwuid(os.geteuid())
    alone = grp.struct_group((user.pw_name, "x", user.pw_gid, []))
    team = grp.struct_group(("team", "x", user.pw_gid, ["ann", user.pw_name]))
    monkeypatch.setattr("grp.getgrgid", lambda gid: team)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # TMPDIR may lie where nobody else comes
        place = Path(name) / "submitit"
        place.mkdir()
        file = place / "job.pkl"
        file.touch()
        Path(name).chmod(0o755)
        for mode, why in [(0o644, None), (0o664, "its group"), (0o646, "everybody")]:
            place.chmod(0o755)
            file.chmod(mode)
            found = others_may_write(file)
            assert found == (why and f"{file.resolve()} is writable by {why}")
            place.chmod(0o700)  # nobody comes this far
            assert own_file(file) == file
        place.chmod(0o755)
        with pytest.raises(UserError, match=r"writable by everybody.*runs the code.*chmod go-w"):
            own_file(file)
        file.chmod(0o664)
        assert others_may_write(file)
        monkeypatch.setattr("grp.getgrgid", lambda gid: alone)  # as with a umask of 002
        assert others_may_write(file) is None
        if os.geteuid() == 0:
            file.chmod(0o644)
            os.chown(file, _NOBODY, -1)
            assert "belongs to nobody" in str(others_may_write(file))
