"""Columns that lie in a file one after the other, each row after row: .npy, .npz and safetensors."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, ResidualMemoryError
from residual_memory.exchange.rows import BLOCK_BYTES, Block, Rows, block_of, held, texts
from residual_memory.memory.format import Manifest

MAX_ROW_BYTES = 1 << 28  # a longer row is a header that lies


class FileColumn:
    """One array in a file, read in blocks of rows by plain reads: pages of a map would count as our memory.

    Parameters
    ----------
    name : of the column, for messages.
    open_file : gives the file.
    start : the byte that the array begins with.
    dtype, shape : of the whole array.
    """

    def __init__(
        self,
        name: str,
        open_file: Callable[[], Any],
        start: int,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._open, self._start = open_file, start
        self.row_bytes = dtype.itemsize
        if not shape:
            raise InvalidInput(f"{name} holds one number, expected an array with a row an example")
        for axis in shape[1:]:
            self.row_bytes *= axis
        if min(shape) < 0 or self.row_bytes > MAX_ROW_BYTES:
            raise CorruptFile(f"{name} announces the shape {shape} of {dtype}, which no such file has; save it again")

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, size: int, first: int = 0) -> Iterator[ndarray]:
        """The rows from `first` on.

        Raises
        ------
        CorruptFile : if the file ends too early.
        """
        with opened(self.name, self._open) as file:
            file.seek(self._start + first * self.row_bytes)
            for start in range(first, len(self), size):
                block = np.empty((min(size, len(self) - start), *self.shape[1:]), self.dtype)
                if block.nbytes:
                    self._fill(file, block.reshape(-1).view(np.uint8).data)
                yield block.astype(self.dtype.newbyteorder("="), copy=False)
            file.read(1)  # only at its end does an archive compare the checksum of a member

    def read(self) -> ndarray:
        """The whole array."""
        step = max(1, BLOCK_BYTES // max(self.row_bytes, 1))
        return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *self.blocks(step)])

    def _fill(self, file: Any, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CorruptFile(f"{self.name} ends too early: it announces the shape {self.shape}; save it again")
            done += count


@contextmanager
def opened(name: str, open_file: Callable[[], Any]) -> Iterator[Any]:
    """The file; what a damaged archive raises inside becomes a `CorruptFile`."""
    try:
        with open_file() as file:
            yield file
    except ResidualMemoryError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptFile(f"{name} is damaged: {error}; save it again") from error


class ColumnRows(Rows):
    """Rows of such columns.

    Parameters
    ----------
    columns : those that `needed` named.
    manifest : of the memory that they were exported from.
    """

    def __init__(self, name: str, columns: Mapping[str, FileColumn], manifest: Manifest | None = None) -> None:
        self.name, self.manifest, self._columns = name, manifest, dict(columns)
        self.columns, self.top_m = held(columns), "indices" in columns
        self.n_rows = len(columns["keys"])
        for values in columns.values():
            if len(values) != self.n_rows:
                raise InvalidInput(
                    f"{values.name} has {len(values):,} rows, but there are {self.n_rows:,} keys in {name}"
                )

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        row_bytes = sum(column.row_bytes for column in self._columns.values())
        step = size or max(1, BLOCK_BYTES // max(row_bytes, 1))
        streams = zip(*(column.blocks(step, first) for column in self._columns.values()), strict=True)
        for number, values in enumerate(streams):
            named = {name: self._plain(name, part) for name, part in zip(self._columns, values, strict=True)}
            yield block_of(first + number * step, named)

    def _plain(self, name: str, values: ndarray) -> ndarray:
        """Names that lie as bytes, padded with NUL, as text."""
        coded = name in ("ids", "groups") and values.dtype == np.uint8 and values.ndim == 2
        return texts(values, self._columns[name].name) if coded else values
