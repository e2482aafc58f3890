"""Headers of safetensors files: what is written is what the format's own reader reads, and a lie is found."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from residual_memory.errors import CorruptFile
from residual_memory.memory.tensors import header_bytes, read_header

TYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def whole(columns: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    head, order = header_bytes({name: (column.dtype, column.shape) for name, column in columns.items()}, metadata)
    return head + b"".join(columns[name].tobytes() for name in order)


def read(content: bytes, limit: int = 1 << 20) -> Any:
    return read_header(lambda size: content[:size], len(content), limit, "here")


def forged(**entries: Any) -> bytes:
    """Eight bytes of data under a header of anybody's making."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def test_every_type_goes_through_the_formats_own_reader() -> None:
    columns = {name: np.arange(6).astype(name).reshape(3, 2) for name in TYPES}
    content = whole(columns, {"note": 'a "quoted" é'})
    found = load(content)
    header = read(content)
    assert header.metadata == {"note": 'a "quoted" é'}
    for name, column in columns.items():
        assert found[name].dtype == column.dtype
        assert (found[name] == column).all()
        entry = header.entries[name]
        assert (entry.dtype, entry.shape) == (column.dtype, (3, 2))
        assert (header.start + entry.first) % column.dtype.itemsize == 0, "a map of it is aligned"


def test_a_type_that_numpy_lacks_is_known_by_name() -> None:
    entry = read(forged(a={"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]})).entries["a"]
    assert (entry.kind, entry.dtype) == ("BF16", None)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]}}, "does not fit its 8 bytes"),
        ({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 16]}}, "overlap or leave holes"),
        ({"a": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}}, "damaged header"),
        ({"a": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}, "damaged header"),
        ({"a": {"dtype": "F64", "shape": [1.0], "data_offsets": [0, 8]}}, "damaged header"),
        ({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 8]}}, "damaged header"),
        ({"a": {"dtype": "F64", "shape": [1 << 62, 4], "data_offsets": [0, 8]}}, "does not fit"),
        ({"a": 3}, "damaged header"),
        ({"__metadata__": {"a": 3}}, "damaged header"),
        ({"__metadata__": 3}, "damaged header"),
        ({}, "leave holes"),
    ],
)
def test_a_header_that_lies_is_found(entries: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptFile, match=f"here.*{said}"):
        read(forged(**entries))


def test_no_more_is_read_than_the_limit() -> None:
    content = whole({"a": np.zeros(4)})
    with pytest.raises(CorruptFile, match=r"announces a header of .* expected at most 10"):
        read(content, limit=10)
    with pytest.raises(CorruptFile, match="announces a header"):
        read(b"\x01\x02")
