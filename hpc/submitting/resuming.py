"""What may differ when a run is started again: a run is resumed by its own recipe, and a flag acts or is refused."""

from __future__ import annotations

import os
from pathlib import Path

from hpc.planning.request import SubmitOptions
from rltrain.arguments.flags import Flags
from rltrain.models.directory import cached_model
from rltrain.run.errors import UserError
from rltrain.run.layout import RunLayout
from rltrain.run.toml_values import read_table

# They say what a run begins with. Afterwards its checkpoint does, and they would change nothing.
FIXED = (
    "hf-checkpoint", "random-init", "load", "finetune", "seed", "rollout-seed",
    "lora-rank", "lora-alpha", "lora-target-modules",
)  # fmt: skip


def check_resume(options: SubmitOptions, before: Flags, now: Flags) -> list[str]:
    """Refuse what would not do what it says; returns the flags that differ, each with its old and its new value.

    Args:
        options: of this start.
        before: flags of the run, none for a new one.
        now: the same with those given.

    Raises:
        UserError: the run is another recipe's, or a flag would be ignored.
    """
    if not before:
        return []
    changed = [
        name for name in sorted(before.keys() | now.keys()) if not _is_same(before.get(name), now.get(name))
    ]
    words = [f"--{name} {_words(before.get(name))} → {_words(now.get(name))}" for name in changed]
    _check_recipe(options, words)
    if has_checkpoint(options.layout) and (ignored := [name for name in changed if name in FIXED]):
        which = ", ".join(word for name, word in zip(changed, words, strict=True) if name in ignored)
        raise UserError(
            f"{which}: the run {options.name} has a checkpoint and resumes from it, so this change would have no"
            " effect. Leave it out, or begin another run with --name."
        )
    return words


def _check_recipe(options: SubmitOptions, changes: list[str]) -> None:
    stored = read_table(options.layout, "submit", missing={}).get("recipes") or []
    if options.is_named or not options.recipes or not stored or stored[-1] == options.recipes[-1]:
        return
    differs = f" They differ in {'; '.join(changes)}." if changes else ""
    raise UserError(
        f"the run {options.name} in {options.runs_dir} was made from recipe {stored[-1]}, not"
        f" {options.recipes[-1]}.{differs} To begin a new run: --name ANOTHER. To resume that run all the same:"
        f" --name {options.name}."
    )


def has_checkpoint(layout: RunLayout) -> bool:
    """Whether the run would go on from a checkpoint of its own."""
    return (checkpoint_directory(layout) / "latest_checkpointed_iteration.txt").exists()


def checkpoint_directory(layout: RunLayout) -> Path:
    """Where the run saves its checkpoints."""
    save = read_table(layout, "train", missing={}).get("save")
    return layout.checkpoints if save is None else layout.root / save


def _is_same(stored: list[str] | None, given: list[str] | None) -> bool:
    """Whether a flag has its old value. Paths are stored as absolute ones."""
    if stored is None or given is None or len(stored) != len(given):
        return stored == given
    return all(
        old == new
        or (
            old.startswith("/")
            and os.path.realpath(old) == os.path.realpath(Path(cached_model(new)).expanduser())
        )
        for old, new in zip(stored, given, strict=True)
    )


def _words(values: list[str] | None) -> str:
    if values is None:
        return "(not given)"
    return " ".join(values) if values else "(given)"
