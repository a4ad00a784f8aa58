"""What servers leave on a node is removed, by themselves or, if they were killed, by the next one."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from rltrain.sglang import leftovers
from rltrain.sglang.leftovers import NodeDirectory, sweep

HOLD = """
import sys, pathlib, json, os
from rltrain.sglang.leftovers import NodeDirectory
directory = NodeDirectory(pathlib.Path(sys.argv[1]))
os.pwrite(directory._owner, json.dumps(["sglang_loads_x", "../precious", "other"]).encode(), 0)
print(directory.path, flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    for path in (shared / "sglang_loads_x", shared / "other", tmp_path / "precious"):
        path.touch()
    monkeypatch.setattr(leftovers, "_SHARED_MEMORY", shared)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    left = Path(holder.stdout.readline().strip())
    (left / "weights").write_bytes(b"x" * 1000)
    assert sweep(tmp_path) == [] and left.is_dir()  # it is in use
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    own = NodeDirectory(tmp_path)
    assert not left.exists() and own.path.is_dir()
    assert {path.name for path in shared.iterdir()} == {"other"} and (tmp_path / "precious").exists()
    own.remove()
    assert list(tmp_path.glob("slurmlime-*")) == []


def test_a_directory_that_is_being_made_is_not_taken_for_a_left_one(tmp_path: Path, monkeypatch) -> None:
    """Another role of the node starts in the moment before the lock is taken."""
    lock = fcntl.flock

    def swept_before(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        assert sweep(tmp_path) == []
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", swept_before)
    own = NodeDirectory(tmp_path)
    assert own.path.is_dir() and sweep(tmp_path) == []
    own.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".owner").touch()
    (tmp_path / "slurmlime-link").symlink_to(elsewhere)
    (tmp_path / "slurmlime-notes").mkdir()  # no process has made it
    assert sweep(tmp_path) == []
    assert elsewhere.is_dir() and (tmp_path / "slurmlime-notes").is_dir()
