"""Run directories that the nodes could not see are refused; options of a submission are kept for the next."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path

import pytest
import tomli_w
from test_slurm_template import FACTS

from hpc.planning.request import SubmitOptions, to_table
from hpc.runs.live_view import describe
from hpc.slurm.client import JobStatus
from hpc.slurm.states import JobState
from hpc.submitting.command_line import read_request, stored_options
from hpc.submitting.run_dir import check_run_dir, filesystem_type, is_one_machine, local_place
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout

REAL = dataclasses.replace(
    FACTS, nodes=tuple(dataclasses.replace(node, address="10.0.0.1") for node in FACTS.nodes)
)
MOUNTS = """\
/dev/sda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
fs:/h /home nfs4 rw 0 0
tmpfs /home/me/a\\040b tmpfs rw 0 0
"""


def test_a_sandbox_is_one_machine() -> None:
    assert is_one_machine(FACTS) and not is_one_machine(REAL)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x", "ext4"),
        ("/tmp/x", "tmpfs"),
        ("/home/me/runs", "nfs4"),
        ("/home/me/a b/c", "tmpfs"),
        ("/homes", "ext4"),
    ],
)
def test_file_systems(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind


def test_places_of_one_machine_are_refused_on_a_cluster(tmp_path: Path) -> None:
    assert local_place(Path("/tmp/runs/x"), MOUNTS) == "/tmp" and local_place(Path("/usr"), MOUNTS) is None
    with pytest.raises(UserError, match=r"this machine's own.*home directory"):
        check_run_dir(Path("/tmp/runs/x"), REAL)
    check_run_dir(tmp_path / "runs" / "x", FACTS)  # a sandbox's nodes see /tmp
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a%j", "a\\b"])
def test_names_that_sbatch_reads_otherwise(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="special meaning"):
        check_run_dir(tmp_path / name / "run", FACTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable() -> None:
    with pytest.raises(UserError, match="may not write to /"):
        check_run_dir(Path("/runs/x"), FACTS)


def test_options_are_stored_for_the_next_submission(tmp_path: Path) -> None:
    words = [
        "--name=r",
        f"--runs-dir={tmp_path}",
        "--partition=gpu",
        "--nodes=4",
        "--time=1:00:00",
        "--detach",
    ]
    words += [
        "--slurm.env.A_b=1",
        "--slurm.rollout.partition=low",
        "--slurm.setup",
        "x y",
        "z",
        "--template=t.j2",
    ]
    options = read_request(words).options
    layout = RunLayout(tmp_path / "r")
    layout.root.mkdir()
    layout.config.write_text(tomli_w.dumps({"submit": to_table(options)}))
    assert stored_options(layout) == dataclasses.replace(options, detach=False, is_named=False)
    layout.config.write_text(tomli_w.dumps({"submit": to_table(SubmitOptions("r", tmp_path))}))
    assert stored_options(layout) == SubmitOptions("r", tmp_path)
    assert "partition" not in tomllib.loads(layout.config.read_text())["submit"]


def test_a_job_in_one_line() -> None:
    assert describe(JobStatus("7", JobState.COMPLETED, ())) == "job 7 is completed"
