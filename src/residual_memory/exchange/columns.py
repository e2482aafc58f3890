"""Columns that lie in a file one after the other, each row after row: .npy, .npz and safetensors."""

import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, ResidualMemoryError
from residual_memory.exchange.rows import BLOCK_BYTES, Block, Rows, block_of, held, moments, needed, texts
from residual_memory.memory.attributes import ENDS, EXPIRES, TEXTS, Texts, tags_of
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

    def runs(self, ends: Iterator[ndarray], before: int) -> Iterator[tuple[ndarray, ndarray]]:
        """Of an array of bytes those up to the last of each of these ends, with the ends among them.

        Parameters
        ----------
        before : where the first run begins.

        Raises
        ------
        CorruptFile : if the ends do not ascend to the array's own.
        """
        if self.dtype != np.uint8 or len(self.shape) != 1:
            raise InvalidInput(f"{self.name} is {self.dtype} {self.shape}, expected the bytes of all texts")
        wrong = CorruptFile(f"{self.name} does not end where its rows do; write it again")
        with opened(self.name, self._open) as file:
            file.seek(self._start + before)
            for some in ends:
                whole = np.concatenate([[before], some])
                if whole[0] < 0 or whole[-1] > len(self) or (whole[1:] < whole[:-1]).any():
                    raise wrong
                flat = np.empty(int(whole[-1]) - before, np.uint8)
                self._fill(file, flat.data)
                yield flat, some - before
                before = int(whole[-1])
            if before != len(self):
                raise wrong
            file.read(1)

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


class TextColumn:
    """Texts in a file: the bytes of all rows in UTF-8, one after the other, and where each row's end.

    Parameters
    ----------
    flat, ends : the two arrays.
    """

    def __init__(self, flat: FileColumn, ends: FileColumn) -> None:
        self.name, self._flat, self._ends = ends.name, flat, ends
        self.row_bytes = ends.row_bytes + len(flat) // max(len(ends), 1)
        if ends.dtype.kind not in "iu" or len(ends.shape) != 1:
            raise InvalidInput(f"{ends.name} is {ends.dtype} {ends.shape}, expected where each row's bytes end")

    def __len__(self) -> int:
        return len(self._ends)

    def blocks(self, size: int, first: int = 0) -> Iterator[Texts]:
        """The texts of the rows from `first` on.

        Raises
        ------
        CorruptFile : if the ends are not those of the texts.
        """
        before = int(next(self._ends.blocks(1, first - 1))[0]) if first else 0
        ends = (block.astype(np.int64) for block in self._ends.blocks(size, first))
        for flat, local in self._flat.runs(ends, before):
            yield Texts(flat, local)


def columns_of(
    name: str, present: Collection[str], column: Callable[[str], FileColumn]
) -> dict[str, FileColumn | TextColumn]:
    """The columns of a file that are read.

    Parameters
    ----------
    name : of the file, for messages.
    present : names of the file's arrays.
    column : gives one by its name.

    Raises
    ------
    InvalidInput : naming one that is missing.
    """
    if alone := [text for text in TEXTS if text + ENDS in present and text not in present]:
        raise InvalidInput(f"{name} holds {alone[0] + ENDS!r}, but no {alone[0]!r} that it is of")
    found: dict[str, FileColumn | TextColumn] = {}
    for wanted in needed(name, present):
        both = wanted in TEXTS and wanted + ENDS in present
        found[wanted] = TextColumn(column(wanted), column(wanted + ENDS)) if both else column(wanted)
    return found


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
    columns : as `columns_of` gives them.
    manifest : of the memory that they were exported from.
    """

    def __init__(
        self, name: str, columns: Mapping[str, FileColumn | TextColumn], manifest: Manifest | None = None
    ) -> None:
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

    def _plain(self, name: str, values: ndarray | Texts) -> Any:
        """A column's values as a block has them; names that lie as bytes, padded with NUL, as text."""
        where = self._columns[name].name
        if isinstance(values, Texts):
            decoded = values.decoded()
            return [tags_of(text) for text in decoded] if name == "tags" else decoded
        if name in ("ids", "groups", *TEXTS) and values.dtype == np.uint8 and values.ndim == 2:
            values = texts(values, where)
        if name == EXPIRES:
            return moments(values, where)
        return _listed(name, values, where) if name in TEXTS else values


def _listed(name: str, values: ndarray, where: str) -> list[Any]:
    """Text of a fixed width as numpy has it, one a row; of tags also some a row."""
    if values.dtype.kind != "U" or values.ndim not in ((1, 2) if name == "tags" else (1,)):
        expected = f"texts, or bytes in UTF-8 and in {name + ENDS!r} where each row's end"
        raise InvalidInput(f"{where} is {values.dtype} {values.shape}, expected {expected}")
    try:
        listed = values.tolist()
    except ValueError as error:
        raise CorruptFile(f"{where} holds what is no text: {error}; save it again") from None
    if name != "tags":
        return list(listed)
    return [tuple(filter(None, [some] if isinstance(some, str) else some)) for some in listed]
