"""Batch scripts: quoting, and what is refused."""

from __future__ import annotations

import shlex
import subprocess

import jinja2
import pytest

from hpc.render import render, sbatch_value
from rltrain.arguments import UserError

VALUES = {
    "name": "demo",
    "partition": "gpu",
    "nodes": 2,
    "output": "/r/%j.log",
    "stop_grace": 120,
    "command": "true",
}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("gpu", "gpu"),
        ("/runs/a-b_c/%j.log", "/runs/a-b_c/%j.log"),
        ("two words", '"two words"'),
        ("nvcr.io#nvidia", '"nvcr.io#nvidia"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
        ("$(touch x)", '"$(touch x)"'),
        ("", '""'),
        (4, "4"),
    ],
)
def test_sbatch_values(value: object, written: str) -> None:
    assert sbatch_value(value) == written


@pytest.mark.parametrize("value", ["a\nb", "a\x00", "\x7f", "a\tb"])
def test_control_characters_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="control characters"):
        render("job.sbatch.j2", **{**VALUES, "partition": value})


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="partition"):
        render("job.sbatch.j2", **{name: value for name, value in VALUES.items() if name != "partition"})


def test_script_is_shell_and_ends_in_the_command_itself() -> None:
    words = ["printf", "%s|", "a b", "$HOME", "it's"]
    script = render("job.sbatch.j2", **{**VALUES, "command": shlex.join(words)})
    assert script.splitlines()[0] == "#!/bin/bash"
    header = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR2@120" in header
    body = script.splitlines()[len(header) + 1 :]
    assert not any(line.startswith("#SBATCH") for line in body)  # those after a command would be ignored
    ran = subprocess.run(["bash", "-u"], input=script, capture_output=True, text=True, check=True)
    assert ran.stdout == "a b|$HOME|it's|"
