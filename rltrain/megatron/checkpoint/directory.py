"""Directories of checkpoints: which are complete, publishing a new one, and which old ones stay. Torch-free.

`<save>/iter_0000040/` appears by a rename when everything in it is written, with a `manifest.json` that has the
size and CRC-32 of every file. A directory that does not agree with its manifest was cut off or damaged, and is
passed over. The iteration number is the number of rollouts trained on.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rltrain.run.errors import UserError
from rltrain.run.files import put_in_place, replace_text

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RELEASE = "release"  # Megatron-LM's name for weights that begin a run
_LATEST = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")
_CHUNK = 1 << 22  # bytes
_THREADS = 4


def iteration_directory(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return directory / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The iteration of a checkpoint's directory; 0 for `release`, as Megatron-LM calls a converted model."""
    match = _ITERATION.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is called as a checkpoint is."""
    return bool(_ITERATION.fullmatch(directory.name)) or directory.name == RELEASE


def checkpoints(directory: Path) -> dict[int, Path]:
    """All checkpoints below a directory, complete or not, by iteration."""
    found = {int(m[1]): path for path in directory.glob("iter_*") if (m := _ITERATION.fullmatch(path.name))}
    if (directory / RELEASE).is_dir():
        found[0] = directory / RELEASE
    return dict(sorted(found.items()))


def find_checkpoint(
    directory: Path, iteration: int | None = None, damaged: Mapping[Path, str] | None = None
) -> Path | None:
    """The newest complete checkpoint below `directory`, or the one of `iteration`; None if there is none.

    Args:
        directory: It may also be a checkpoint itself.
        iteration: Take this one.
        damaged: Checkpoints that are not to be taken, and why.

    Raises:
        UserError: the checkpoint of the wanted `iteration` is missing or incomplete.
    """
    if iteration is None and is_checkpoint(directory):
        directory, iteration = directory.parent, iteration_of(directory)
    found = checkpoints(directory)
    problems = {number: (damaged or {}).get(path) or problem(path) for number, path in found.items()}
    complete = [number for number, why in problems.items() if why is None]
    if iteration is not None:
        if iteration not in complete:
            why = problems.get(iteration) or "there is none"
            raise UserError(
                f"{directory} has no complete checkpoint of step {iteration} ({why}); complete are"
                f" {', '.join(map(str, complete)) or 'none'}."
            )
        return found[iteration]
    newest = complete[-1] if complete else None
    passed_over = [number for number in found if newest is None or number > newest]
    if passed_over:
        logger.warning(
            "passed over incomplete checkpoints %s; %s",
            ", ".join(f"{found[number].name} ({problems[number]})" for number in passed_over),
            "there is no complete one" if newest is None else f"continuing from {found[newest].name}",
        )
    return None if newest is None else found[newest]


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used: a file that is missing or has another size. None if it can."""
    if not (checkpoint / MANIFEST).exists():
        return _foreign_problem(checkpoint)
    try:
        files = manifest(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, entry in files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} of {entry['size']} bytes"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the manifest lists is there with its full size."""
    return problem(checkpoint) is None


def manifest(checkpoint: Path) -> dict[str, dict[str, int]]:
    """File → `size` in bytes and `crc32`."""
    return json.loads((checkpoint / MANIFEST).read_text())["files"]


def damaged_file(checkpoint: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first file whose content is not what was written, among every `parts`-th file; None if all are well."""
    if not (checkpoint / MANIFEST).exists():
        return None
    own = sorted(manifest(checkpoint).items())[part::parts]
    found = checksums_of([checkpoint / name for name, _ in own])
    return next((name for (name, entry), crc in zip(own, found, strict=True) if crc != entry["crc32"]), None)


def checksums_of(paths: Sequence[Path]) -> list[int]:
    """CRC-32 of each file, several at a time: zlib lets other threads run."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(checksum, paths))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def publish(temporary: Path, final: Path, checksums: Mapping[str, int]) -> None:
    """Give a finished directory its manifest, its name, and make it the latest.

    Args:
        checksums: CRC-32 of files that are known already; the others are read.
    """
    files: dict[str, dict[str, int]] = {}
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(temporary))
            known = checksums.get(name)
            files[name] = {
                "size": path.stat().st_size,
                "crc32": checksum(path) if known is None else known,
            }
    replace_text(temporary / MANIFEST, json.dumps({"files": files}, indent=1), durable=True)
    put_in_place(temporary, final)  # of one cut off in an earlier attempt, or saved again
    replace_text(final.parent / _LATEST, str(iteration_of(final)), durable=True)


def to_remove(iterations: Collection[int], keep_last: int | None, retain_interval: int | None) -> list[int]:
    """Which checkpoints may go: not the newest `keep_last`, and none of a multiple of `retain_interval`.

    Without either, none. `retain_interval` alone keeps the newest one beside its multiples, as Megatron-LM does.
    """
    if keep_last is None and retain_interval is None:
        return []
    newest = sorted(iterations)[-(keep_last or 1) :]
    return [
        number
        for number in sorted(iterations)
        if number not in newest and not (retain_interval and number % retain_interval == 0)
    ]


def prune(directory: Path, keep_last: int | None, retain_interval: int | None) -> list[Path]:
    """Remove complete checkpoints that `to_remove` names. Returns them.

    A directory loses its name first, so that a half-removed one is no longer a checkpoint.
    """
    found = {number: path for number, path in checkpoints(directory).items() if path.name != RELEASE}
    complete = [number for number, path in found.items() if is_complete(path)]
    removed = []
    for number in to_remove(complete, keep_last, retain_interval):
        leaving = found[number].with_name(f".{found[number].name}.removed")
        found[number].rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
        removed.append(found[number])
    return removed


def _foreign_problem(checkpoint: Path) -> str | None:
    """The same for a checkpoint that Megatron-LM or slime wrote, which has no manifest of ours."""
    files = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    if any(name.startswith("mp_rank_") for name in files):
        shards = [name for name in files if name.startswith("mp_rank_")]
        empty = next((name for name in shards if not any((checkpoint / name).glob("*.pt"))), None)
        return None if empty is None else f"{empty} is empty"
    wanted = ("metadata.json", ".metadata", "common.pt")
    if missing := [name for name in wanted if name not in files]:
        return f"{MANIFEST} is missing" if len(missing) > 1 else f"{missing[0]} is missing"
    return _missing_shard(checkpoint)


def _missing_shard(checkpoint: Path) -> str | None:
    from torch.distributed.checkpoint import FileSystemReader

    ends: dict[str, int] = {}
    stored: Any = FileSystemReader(checkpoint).read_metadata().storage_data
    for item in stored.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in sorted(ends.items()):
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size < end:
            return f"{name} has {path.stat().st_size} of {end} bytes"
    return None
