"""Token ids to text, from a tokenizer.json alone: reading a run needs no tokenizer library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis.reading.errors import DamagedFileError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def find_tokenizer(run_dir: Path, hf_checkpoint: str | None) -> Path | None:
    """The tokenizer.json of a run: of its checkpoint, or one that lies in the run directory."""
    places = [
        *sorted(run_dir.glob("weights/*/"), reverse=True),
        run_dir / "checkpoints" / "hf",
        run_dir / "tokenizer",
    ]
    if hf_checkpoint:
        places = [run_dir / hf_checkpoint, *places]  # an absolute path stays as it is
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)


class Vocabulary:
    """The text of each token id."""

    def __init__(self, tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # Unigram: pairs of token and score
            self._tokens = {i: str(pair[0]) for i, pair in enumerate(vocab)}
        else:
            self._tokens = {int(i): str(token) for token, i in vocab.items()}
        kind = json.dumps([tokenizer.get("decoder"), tokenizer.get("pre_tokenizer")])
        self._bytes = _byte_alphabet() if "ByteLevel" in kind else None
        self._metaspace = "Metaspace" in kind or "▁" in kind
        self._added = {
            int(added["id"]): str(added["content"]) for added in tokenizer.get("added_tokens") or []
        }

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """The vocabulary of a tokenizer.json.

        Raises:
            DamagedFileError: the file is not a tokenizer.json.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedFileError(f"{path} is not a tokenizer.json: {error}") from error
        if not isinstance(content, dict):
            raise DamagedFileError(f"{path} is not a tokenizer.json")
        return cls(content)

    @property
    def ids(self) -> set[int]:
        """All token ids that have a text."""
        return self._tokens.keys() | self._added.keys()

    def texts(self, ids: Iterable[int]) -> list[str | None]:
        """Text of each id; None if the vocabulary lacks it. Bytes that do not make a character alone show as �."""
        return [
            None if (raw := self._raw(int(i))) is None else raw.decode("utf-8", errors="replace") for i in ids
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of all ids together; unknown ones as ⟨id⟩."""
        parts = [self._raw(int(i)) or f"⟨{int(i)}⟩".encode() for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")

    def _raw(self, number: int) -> bytes | None:
        if number in self._added:
            return self._added[number].encode("utf-8", errors="replace")
        token = self._tokens.get(number)
        if token is None:
            return None
        if self._bytes is not None:
            return b"".join(self._bytes.get(char, char.encode("utf-8", errors="replace")) for char in token)
        if match := _BYTE.fullmatch(token):
            return bytes.fromhex(match[1])
        return (token.replace("▁", " ") if self._metaspace else token).encode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins of the 256 bytes: printable Latin-1 is itself, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    return {char: bytes([byte]) for byte, char in stand_ins.items()}
