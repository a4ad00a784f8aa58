"""Batch scripts: quoting, own templates, and what is refused."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from hpc.planning.script import BatchScript, sbatch_value
from rltrain.run.errors import UserError

HEADER = {"job-name": "demo", "nodes": "2", "requeue": True}


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


@pytest.mark.parametrize("value", ["a\nb", "a\x00", "\x7f", "a\tb", "a\u2028b", "a\x85b"])
def test_control_characters_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="control characters"):
        BatchScript(({"comment": value},), "true").text()


def test_script_is_shell_and_ends_in_the_command_itself() -> None:
    words = ["sh", "-c", 'printf "%s|" "$@" "$HOSTILE"', "sh", "a b", "$HOME", "it's"]
    hostile = "'\"\\ $(exit 7) ; # ü\n*"
    script = BatchScript((HEADER,), shlex.join(words), env={"HOSTILE": hostile}, setup=("umask 077",)).text()
    lines = script.splitlines()
    assert lines[:4] == ["#!/bin/bash", "#SBATCH --job-name=demo", "#SBATCH --nodes=2", "#SBATCH --requeue"]
    assert not any(line.startswith("#SBATCH") for line in lines[4:])  # those after a command would be ignored
    ran = subprocess.run(["bash", "-u"], input=script, capture_output=True, text=True, check=True)
    assert ran.stdout == f"a b|$HOME|it's|{hostile}|"


def test_components_of_a_heterogeneous_job() -> None:
    lines = BatchScript(({"nodes": "1"}, {"nodes": "2"}), "true").text().splitlines()
    assert lines[1:4] == ["#SBATCH --nodes=1", "#SBATCH hetjob", "#SBATCH --nodes=2"]


def test_own_template_extends_ours(tmp_path: Path) -> None:
    template = tmp_path / "site.j2"
    template.write_text(
        '{% extends "job.sbatch.j2" %}\n{% block setup %}\nsource /site/env\n{% endblock %}\n'
    )
    script = BatchScript((HEADER,), "true", setup=("never",)).text(template)
    assert "source /site/env\n" in script and "never" not in script and "#SBATCH --nodes=2" in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ partitoin }}", "partitoin.*A template is given: components, command"),
        ("{% if %}", "own.j2, line 1"),
        ('{% extends "nothing.j2" %}', "there is no nothing.j2"),
        (None, "there is no own.j2"),
    ],
)
def test_templates_that_can_not_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "own.j2").write_text(text)
    with pytest.raises(UserError, match=message):
        BatchScript((HEADER,), "true").text(tmp_path / "own.j2")
