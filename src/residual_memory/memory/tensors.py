"""The header of a safetensors file: 8 bytes of its length, JSON, then the columns in the order of their places."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from residual_memory.errors import CorruptFile

Column = tuple[np.dtype[Any], tuple[int, ...]]  # type and shape
METADATA = "__metadata__"

_NAMES = {
    "<i8": "I64",
    "<i4": "I32",
    "<i2": "I16",
    "|i1": "I8",
    "<f8": "F64",
    "<f4": "F32",
    "<f2": "F16",
    "<u8": "U64",
    "<u4": "U32",
    "<u2": "U16",
    "|u1": "U8",
}
_DTYPES = {name: np.dtype(code) for code, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A column in a header.

    Attributes
    ----------
    kind : the format's name of the type.
    shape : of the whole column.
    first, last : bytes that it takes, counted from the end of the header.
    """

    kind: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The type; None for one that numpy does not have, or that is not read here."""
        return _DTYPES.get(self.kind)

    @staticmethod
    def of(values: dict[str, Any]) -> "Entry":
        first, last = values["data_offsets"]
        entry = Entry(values["dtype"], tuple(values["shape"]), first, last)
        fits = isinstance(entry.kind, str) and all(map(is_whole, (*entry.shape, first, last))) and first <= last
        if set(values) != {"dtype", "shape", "data_offsets"} or not fits:
            raise ValueError("an entry is not of the expected form")
        return entry


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes
    ----------
    entries : its columns by name.
    metadata : text by name, which is anybody's.
    start : the place of the first column.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int


def is_whole(value: Any) -> bool:
    """Whether it is an integer that a file may hold as a length or a count."""
    return type(value) is int and 0 <= value <= 1 << 63


def header_bytes(columns: Mapping[str, Column], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[str]]:
    """The first bytes of a file of these columns, and the order in which the columns follow.

    The widest types come first, so that every column starts at a multiple of its own item size.
    """
    order = sorted(columns, key=lambda name: (-columns[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = columns[name]
        end = offset + dtype.itemsize * _product(shape)
        kind = _NAMES[dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def read_header(head: Callable[[int], bytes], length: int, limit: int, where: str) -> Header:
    """The header of a file, if it describes exactly what is there.

    Parameters
    ----------
    head : gives the first bytes of the file.
    length : bytes of the file.
    limit : the longest header that is read.

    Raises
    ------
    CorruptFile : if it does not; nothing as large as it claims to be was allocated.
    """
    (size,) = struct.unpack("<Q", head(8).ljust(8, b"\xff"))
    if size > min(limit, length):
        raise CorruptFile(f"{where} announces a header of {size:,} bytes, expected at most {min(limit, length):,}")
    try:
        parsed = json.loads(head(8 + size)[8:], object_pairs_hook=_without_repeats)
        metadata = parsed.pop(METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not text")
        entries = {name: Entry.of(values) for name, values in parsed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{where} has a damaged header: {error!r}") from error
    header = Header(entries, metadata, 8 + size)
    _check_places(header, length, where)
    return header


def _check_places(header: Header, length: int, where: str) -> None:
    places = sorted((entry.first, entry.last) for entry in header.entries.values())
    ends = [0, *(last for _, last in places)]
    if [first for first, _ in places] != ends[:-1] or header.start + ends[-1] != length:
        raise CorruptFile(f"{where}: its columns overlap or leave holes")
    for name, entry in header.entries.items():
        size = None if entry.dtype is None else entry.dtype.itemsize * _product(entry.shape)
        if size not in (None, entry.last - entry.first):
            held = entry.last - entry.first
            raise CorruptFile(f"{where}: column {name!r} of shape {entry.shape} does not fit its {held} bytes")


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is given twice")
    return dict(pairs)
