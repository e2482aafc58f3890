"""safetensors files: one tensor a column, text as UTF-8 bytes [n w] padded with NUL."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.exchange.columns import ColumnRows, FileColumn, columns_of
from residual_memory.exchange.description import described_in
from residual_memory.exchange.fields import Exported, Field, TextField
from residual_memory.memory.attributes import ENDS
from residual_memory.memory.format import MAX_HEADER, MAX_MANIFEST, encoded_strings
from residual_memory.memory.tensors import Column, Entry, header_bytes, read_header

DESCRIPTION = "residual_memory"  # the text among the file's metadata that makes an identical memory again
MAX_FILE_HEADER = MAX_HEADER + 2 * MAX_MANIFEST  # with a description, in which every quote is escaped


def safetensors_rows(path: Path) -> ColumnRows:
    """The tensors of a safetensors file."""
    header = read_header(partial(_head, path), path.stat().st_size, MAX_FILE_HEADER, str(path))
    entries = header.entries
    columns = columns_of(str(path), entries, lambda name: _column(path, name, entries[name], header.start))
    text = header.metadata.get(DESCRIPTION)
    manifest = None if text is None else described_in(text.encode(errors="replace"), str(path), entries)
    return ColumnRows(str(path), columns, manifest)


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _column(path: Path, name: str, entry: Entry, start: int) -> FileColumn:
    where = f"{path}:{name}"
    if entry.dtype is None:
        raise InvalidInput(f"{where} is {entry.kind}, expected a type that numpy has, such as F16, F32 or I64")
    return FileColumn(where, partial(open, path, "rb"), start + entry.first, entry.dtype, entry.shape)


# ---------------------------------------------------------------------- out


def write_safetensors(file: IO[bytes], exported: Exported) -> None:
    """The columns of a memory as tensors, block after block."""
    columns = {field.name: _stored(field, exported) for field in exported.fields}
    blocks: dict[str, Callable[[], Iterator[ndarray]]] = {
        field.name: partial(_blocks, field, columns[field.name], exported) for field in exported.fields
    }
    for text in exported.texts:
        columns[text.name] = np.dtype(np.uint8), (text.n_bytes,)
        columns[text.name + ENDS] = np.dtype(np.int64), (exported.n_rows,)
        blocks[text.name] = partial(_bytes, text, exported)
        blocks[text.name + ENDS] = partial(exported.ends, text)
    head, order = header_bytes(columns, {DESCRIPTION: exported.description.decode("ascii")})
    file.write(head)
    for name in order:
        for block in blocks[name]():
            file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _stored(field: Field, exported: Exported) -> Column:
    if field.dtype.kind != "U":
        return field.dtype, (exported.n_rows, *field.shape)
    widths = (encoded_strings(field.take(rows)).shape[1] for rows in exported.row_blocks())
    return np.dtype(np.uint8), (exported.n_rows, max(widths, default=1))


def _blocks(field: Field, column: Column, exported: Exported) -> Iterator[ndarray]:
    for rows in exported.row_blocks():
        values: Any = field.take(rows)
        if field.dtype.kind == "U":
            values = encoded_strings(values)
            values = np.pad(values, ((0, 0), (0, column[1][1] - values.shape[1])))
        yield values


def _bytes(text: TextField, exported: Exported) -> Iterator[ndarray]:
    return (text.take(rows).flat for rows in exported.row_blocks())
