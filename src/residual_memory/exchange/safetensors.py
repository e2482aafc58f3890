"""safetensors files: one tensor a column, text as UTF-8 bytes [n w] padded with NUL."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.exchange.columns import ColumnRows, FileColumn
from residual_memory.exchange.fields import Exported, Field
from residual_memory.exchange.rows import needed
from residual_memory.memory.format import MAX_HEADER, MAX_MANIFEST, Manifest, encoded_strings
from residual_memory.memory.tensors import Column, Entry, header_bytes, read_header

DESCRIPTION = "residual_memory"  # the text among the file's metadata that makes an identical memory again
MAX_FILE_HEADER = MAX_HEADER + 2 * MAX_MANIFEST  # with a description, in which every quote is escaped


def safetensors_rows(path: Path) -> ColumnRows:
    """The tensors of a safetensors file."""
    header = read_header(partial(_head, path), path.stat().st_size, MAX_FILE_HEADER, str(path))
    columns = {
        name: _column(path, name, header.entries[name], header.start) for name in needed(str(path), header.entries)
    }
    text = header.metadata.get(DESCRIPTION)
    manifest = None if text is None else Manifest.from_bytes(text.encode(errors="replace"), str(path))
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
    fields = {field.name: field for field in exported.fields}
    columns = {name: _stored(field, exported) for name, field in fields.items()}
    head, order = header_bytes(columns, {DESCRIPTION: exported.description.decode("ascii")})
    file.write(head)
    for name in order:
        for block in _blocks(fields[name], columns[name], exported):
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
