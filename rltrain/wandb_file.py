"""The records of a W&B offline file, read without W&B.

A `.wandb` file is a log in LevelDB's framing (blocks of 32 KiB, records split into fragments) of protocol
buffers (`wandb/proto/wandb_internal.proto`), of which only runs, configurations and history are looked at.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_MAGIC = b":W&B\xe1\xbe\x00"
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_TYPE_CRC = [zlib.crc32(bytes([kind])) for kind in range(5)]

# Field numbers of wandb_internal.proto.
HISTORY, CONFIG, RUN = 2, 5, 17
_NUMBER_TAG = 1 << 3
# Fields that may stand before the content: control, uuid, _info.
_ENVELOPE_TAGS = {16 << 3 | 2, 19 << 3 | 2, 200 << 3 | 2}
_KEY, _NESTED_KEY, _VALUE_JSON = 1, 2, 16
_VALUE_TAG = b"\x82\x01"
_VARINT = rb"[\x80-\xff]{0,4}[\x00-\x7f]"
# Key and JSON value of one item of a history record. JSON holds no control characters, and what follows a value
# begins with one, so a value cannot run over.
_ITEM = re.compile(rb"[\x0a\x12]" + _VARINT + rb"([^\x00-\x1f\x82]+)\x82\x01" + _VARINT + rb"([^\x00-\x1f]*)")


# An item that no logger writes, to tell rows apart after they have been put together.
_SEPARATOR_KEY = b"\x7f"
_SEPARATOR = b"\x12\x01" + _SEPARATOR_KEY + _VALUE_TAG + b"\x010"


def read_records(path: Path, complain: Callable[[str], object]) -> list[bytes]:
    """Whole records of a `.wandb` file; a record at the end that is still being written is left out.

    Args:
        complain: is told what is wrong with a file of another kind, or with one that is damaged before its end, whose
            records before the damage are returned.
    """
    data = path.read_bytes()
    if data[:7] != _MAGIC:
        if data:
            complain("it does not begin as a W&B file does")
        return []
    try:
        return list(_frames(data))
    except ValueError as error:
        complain(str(error))
        return list(_frames(data, end_at_damage=True))


def _frames(data: bytes, *, end_at_damage: bool = False) -> Iterator[bytes]:
    position, end, parts = 7, len(data), []  # type: int, int, list[bytes]
    while position + 7 <= end:
        left = _BLOCK - position % _BLOCK
        if left < 7:  # no header fits: the rest of the block is padding
            position += left
            continue
        crc, length, kind = _HEADER.unpack_from(data, position)
        if length > left - 7:  # no fragment goes beyond its block, however much is still to come
            if end_at_damage:
                return
            raise ValueError(f"the record at byte {position} is longer than its block")
        body = data[position + 7 : position + 7 + length]
        if len(body) < length or not (crc or length or kind):  # being written, or space reserved for more
            return
        if not _FULL <= kind <= _LAST or zlib.crc32(body, _TYPE_CRC[kind]) != crc:
            if end_at_damage:
                return
            raise ValueError(f"the record at byte {position} does not match its checksum")
        position += 7 + length
        if kind == _FULL:
            yield body
        else:
            parts.append(body)
            if kind == _LAST:
                yield b"".join(parts)
                parts = []


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: bytes, an int, or a float (fixed 64 bit).

    Raises:
        ValueError: it is not one.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value: Any
            value, position = _varint(message, position)
        elif kind == 2:
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = struct.unpack_from("<d" if kind == 1 else "<f", message, position)[0]
            position += size
        else:
            raise ValueError(f"unknown wire type {kind}")
        yield tag >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7


def record_kind(record: bytes) -> int:
    """Field number of a record's content, which stands behind the record's number and its writer."""
    position, end = 0, len(record)
    while position < end:
        tag, position = _varint(record, position)
        if tag == _NUMBER_TAG:
            while record[position] >= 0x80:
                position += 1
            position += 1
        elif tag in _ENVELOPE_TAGS:
            length, position = _varint(record, position)
            position += length
        else:
            return tag >> 3
    return 0


def run_fields(records: list[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Identity of the run (`id`, `entity`, `project`, `name`) and its configuration, of such records."""
    names = {1: "id", 2: "entity", 3: "project", 8: "name"}
    identity: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for record in records:
        for kind, body in fields(record):
            if kind == CONFIG:
                config |= dict(_items(body))
            elif kind == RUN:
                parts = list(fields(body))
                identity |= {names[number]: value.decode() for number, value in parts if number in names}
                config |= {
                    key: value for number, update in parts if number == 4 for key, value in _items(update)
                }
    return identity, {key: value for key, value in config.items() if key != "_wandb"}


def _items(message: bytes) -> Iterator[tuple[str, Any]]:
    """Key and value of the items in field 1."""
    for number, item in fields(message):
        if number == 1:
            key, value = _item(item)
            yield key, json.loads(value)


def _item(item: bytes) -> tuple[str, bytes]:
    """Key (nested ones joined by dots) and JSON of one item."""
    keys, value = [], b"null"
    for number, content in fields(item):
        if number in (_KEY, _NESTED_KEY):
            keys.append(content.decode("utf-8", errors="replace"))
        elif number in (_VALUE_JSON, 8):
            value = content
        elif number == 4:
            value = b"true" if content else b"false"
        elif number in (5, 6):
            value = json.dumps(content).encode()
        elif number == 7:
            value = json.dumps(content.decode("utf-8", errors="replace")).encode()
    return ".".join(key for key in keys if key), value


def read_history(records: list[bytes]) -> dict[str, list[Any]]:
    """The history records by column, one entry a row; None where a row has no such key.

    One regular expression takes the rows apart, which is several times as fast as reading field by field.
    The latter is done where the expression may be wrong: checked with the first and last row, and by counting.
    """
    if not records:  # W&B was killed before it had written any
        return {}
    is_plain = all(_quick_row(record) == _slow_row(record) for record in [*records[:1], *records[-1:]])
    rows = _quick_rows(records) if is_plain else [_slow_row(record) for record in records]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for key in keys:
        values = b",".join([row.get(key, b"null") for row in rows])
        columns[key.decode("utf-8", errors="replace")] = json.loads(b"[" + values + b"]")
    return columns


def _quick_row(record: bytes) -> dict[bytes, bytes]:
    return dict(_ITEM.findall(record))


def _quick_rows(records: list[bytes]) -> list[dict[bytes, bytes]]:
    items = _ITEM.findall(_SEPARATOR.join([b"", *records]))
    starts = [i + 1 for i, (key, _) in enumerate(items) if key == _SEPARATOR_KEY]
    ends = [*(start - 1 for start in starts[1:]), len(items)]
    rows = [dict(items[start:end]) for start, end in zip(starts, ends, strict=True)]
    # The tag also occurs in numbers, such as that of step 130: then the count is too large, and we look closely.
    return [
        row if len(row) == record.count(_VALUE_TAG) else _slow_row(record)
        for row, record in zip(rows, records, strict=True)
    ]


def _slow_row(record: bytes) -> dict[bytes, bytes]:
    body = next(value for field, value in fields(record) if field == HISTORY)
    items = [_item(item) for field, item in fields(body) if field == 1]
    return {key.encode(): value for key, value in items}
