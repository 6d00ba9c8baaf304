"""What a file of weights that was cut short has lost: its start says which tensors should follow, and where they end."""

from __future__ import annotations

import json
import pickletools
import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors takes no more."""
ENTRY = b"PK\x03\x04"
"""How each part of a zip file begins."""
ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
"""Of torch's storage classes; others (Byte, Char, Bool) have one."""


def lost_from_safetensors(path: Path) -> str:
    """Which tensors of a safetensors file lie beyond its end, in words; empty where nothing is missing.

    Source of the format: 8 bytes of the header's length, the header as JSON with `data_offsets` from its end on, the values.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if length > LONGEST_HEADER:
            return ""  # not cut but something else
        if len(head) < 8 or 8 + length > size:
            return f"its {size:,} bytes end before its list of tensors does, so all of them are lost"
        try:
            places = json.loads(file.read(length))
            ends = {key: 8 + length + place["data_offsets"][1] for key, place in places.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return ""  # not cut but wrong: safetensors' own words say how
    return _in_words([key for key in sorted(ends, key=ends.__getitem__) if ends[key] > size], max(ends.values(), default=0), size)


def lost_from_torch(path: Path) -> str:
    """The same of a file that `torch.save` has written: a zip of a pickle, then each storage. Its pickle is read as text, never run."""
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        if data[: len(ENTRY)] != ENTRY[:size]:
            return ""  # not the form of the last years: torch's own words have to do
        try:
            data.seek(_content(data, 0))
            tensors = list(_tensors_in_pickle(data))
        except (ValueError, struct.error, IndexError):
            return f"its {size:,} bytes end before its list of tensors does, so all of them are lost"
        whole = _whole_storages(data, tensors)
        lost = [key for key, storage, _ in tensors if storage not in whole]
    return _in_words(lost, None, size) or f"its {size:,} bytes lack the directory that a zip file ends with"


def _whole_storages(data: mmap, tensors: list[tuple[str, str, int]]) -> set[str]:
    """The storages that lie in the file to their last byte; they come in the order in which the pickle names them."""
    whole, cursor = set(), 0
    for _, storage, length in tensors:
        if storage in whole:  # tied weights
            continue
        while (cursor := data.find(ENTRY, cursor)) >= 0 and not _name(data, cursor).endswith(f"/data/{storage}".encode()):
            cursor += len(ENTRY)
        if cursor < 0 or _content(data, cursor) + length > len(data):
            break
        cursor = _content(data, cursor) + length
        whole.add(storage)
    return whole


def _in_words(lost: list[str], whole_size: int | None, size: int) -> str:
    if not lost:
        return ""
    others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    of = f" of {whole_size:,}" if whole_size else ""
    return f"it ends after {size:,}{of} bytes; lost are {lost[0]}{others}"


def _name(data: mmap, entry: int) -> bytes:
    """A zip entry's name; empty where the file ends before it."""
    length = int.from_bytes(data[entry + 26 : entry + 28], "little")
    return data[entry + 30 : entry + 30 + length]


def _content(data: mmap, entry: int) -> int:
    """Where the content of a zip entry begins, after its name and padding."""
    name, extra = struct.unpack_from("<2H", data, entry + 26)
    return entry + 30 + name + extra


def _tensors_in_pickle(file: mmap) -> Iterator[tuple[str, str, int]]:
    """(key, storage's name, storage's bytes) of each tensor of a dictionary, in order.

    A tensor is pickled as its key, the functions that rebuild it, and `("storage", class, name, device, items)`. What was said before
    is fetched from a memo. Only what has a value is looked at: text, numbers, names of classes and functions.
    """
    said: list[Any] = []
    memo: dict[Any, Any] = {}
    last = None
    for operation, argument, _ in pickletools.genops(file):  # pyright: ignore[reportArgumentType]  # a map reads as a file does
        if operation.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        last = memo.get(argument) if operation.name in ("BINGET", "LONG_BINGET") else argument
        if last is not None:
            said.append(last)
        if operation.name == "BINPERSID":
            kind, storage, _, items = said[-4:]
            at = len(said) - 6
            while str(said[at]).startswith("torch._utils "):
                at -= 1
            storage_class = str(kind).rpartition(" ")[2].removesuffix("Storage")
            yield str(said[at]), str(storage), items * ITEM_BYTES.get(storage_class, 1)
