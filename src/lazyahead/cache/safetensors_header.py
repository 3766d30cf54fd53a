"""What a safetensors file says about itself, read and checked before anything of its size is
allocated."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself accepts."""
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element, by name of the dtype."""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The tensors of a file and the texts beside them."""

    metadata: dict[str, str]
    tensors: dict[str, Entry]


def read_header(path: str | Path, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The header of a file. Raises ValueError with the reason when it is damaged or longer than
    `max_bytes`, or when the tensors do not fill the file; OSError when it cannot be read."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            raise ValueError("a git-lfs pointer stands in its place; run `git lfs pull`")
        if len(start) < 8:
            raise ValueError(f"it has {size} bytes, fewer than any header")
        (length,) = struct.unpack("<Q", start)
        if length > min(max_bytes, size - 8):
            raise ValueError("it is cut short or no safetensors file")
        raw = file.read(length)
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata holds something other than texts")
    return Header(metadata, _entries(values, size - 8 - length))


def _entries(values: dict[str, Any], num_bytes: int) -> dict[str, Entry]:
    """The tensors, whose places must lie side by side in `num_bytes`."""
    entries: dict[str, Entry] = {}
    places: list[tuple[int, int]] = [(0, 0)]
    for name, value in values.items():
        entry, place = _entry(name, value)
        entries[name] = entry
        places.append(place)
    places = [*sorted(places), (num_bytes, num_bytes)]
    for (_, end), (begin, _) in pairwise(places):
        if end != begin:
            reason = "its tensors overlap or leave gaps"
            if begin == num_bytes:
                reason = f"it should hold {end} bytes of tensors and holds {num_bytes}"
            raise ValueError(reason)
    return entries


def _entry(name: str, value: Any) -> tuple[Entry, tuple[int, int]]:
    """One tensor and its half-open place."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header describes {name!r} by something else than dtype and shape")
    dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
        raise ValueError(f"{name!r} has a shape or a place that is none")
    if place[1] - place[0] != -(-prod(shape) * BITS[dtype] // 8):
        raise ValueError(f"{name!r} of shape {shape} does not fill its place of the file")
    return Entry(dtype, tuple(shape)), (place[0], place[1])


def _are_counts(values: Any) -> bool:
    """Whether these are whole numbers that are not negative."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
        for value in values
    )
