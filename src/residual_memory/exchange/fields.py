"""What of a memory goes out: its rows that are not forgotten, column by column or block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int64, Shaped
from numpy import ndarray

from residual_memory.exchange.description import description_of
from residual_memory.exchange.rows import BLOCK_BYTES, TOP_M, Block, block_of
from residual_memory.memory import Column, Memory, Snapshot
from residual_memory.memory.attributes import EXPIRES, NEVER, TEXTS, Texts, expires_in, tags_of, texts_in
from residual_memory.progress import Advance

_Taken = TypeVar("_Taken", ndarray, Texts)


@dataclass(frozen=True)
class Field:
    """One column of what goes out.

    Attributes
    ----------
    name : keys, predictions, labels, …
    dtype, shape : of the column, and of one row in it; text is of a fixed width.
    take : gives the values of some rows.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    take: Callable[[Int64[ndarray, " b"]], ndarray]


@dataclass(frozen=True)
class TextField:
    """A column of texts of what goes out.

    Attributes
    ----------
    name : owners, tags or snippets.
    n_bytes : of all rows.
    lengths, take : give the bytes that the texts of some rows have, and these; the rows ascend.
    """

    name: str
    n_bytes: int
    lengths: Callable[[Int64[ndarray, " b"]], Int64[ndarray, " b"]]
    take: Callable[[Int64[ndarray, " b"]], Texts]


class Exported:
    """The rows of a memory as they are now, in their order; a change of the memory does not show.

    Values are those that are stored, to the last bit, but for probabilities on a log scale: they are decoded, and give
    the same codes when they are stored again.

    Attributes
    ----------
    snapshot : what the rows are of.
    advance : called with the number of rows whenever a block of a column was taken, for a progress bar.
    """

    def __init__(self, memory: Memory) -> None:
        self.snapshot: Snapshot = memory.snapshot
        self.n_rows = len(self.snapshot)
        self.advance: Advance = lambda values: None

    @property
    def ids(self) -> Shaped[ndarray, " n"]:
        """Of the rows, all at once."""
        return self.snapshot.ids

    @property
    def description(self) -> bytes:
        """What makes an identical memory of the same rows."""
        carried = [field.name for field in self.fields if field.name == EXPIRES]
        return description_of(self.snapshot.manifest, [*carried, *(text.name for text in self.texts)])

    @cached_property
    def fields(self) -> list[Field]:
        """The columns."""
        snapshot = self.snapshot
        columns = {name: snapshot.column(name) for name in snapshot.layout.columns(snapshot.manifest.top_m or 1)}
        names = {"ids": snapshot.id_column, "groups": snapshot.group_column}
        fields = [self._field(name, column) for name, column in columns.items()]
        fields += [Field(name, column.dtype, (), column.take) for name, column in names.items() if column is not None]
        parts = [expires_in(table, len(table["ids"])) for table in snapshot.tables]
        if any((part[alive] < NEVER).any() for part, alive in zip(parts, self._alive, strict=True)):
            fields.append(Field(EXPIRES, np.dtype(np.int64), (), Column(parts, np.zeros(0, np.int64)).take))
        return [replace(field, take=self._told(field.take)) for field in fields]

    @cached_property
    def texts(self) -> list[TextField]:
        """The columns of texts that some row has."""
        tables = self.snapshot.tables
        found = [
            self._text_field(name, [texts_in(table, name, len(table["ids"])) for table in tables])
            for name in TEXTS
            if any(name in table for table in tables)
        ]
        return [field for field in found if field.n_bytes]

    def ends(self, text: TextField) -> Iterator[Int64[ndarray, " b"]]:
        """Where the texts of the rows end when they lie one after the other, block by block."""
        before = 0
        for rows in self.row_blocks():
            ends = before + np.cumsum(text.lengths(rows))
            before = int(ends[-1])
            yield ends

    def row_blocks(self) -> Iterator[Int64[ndarray, " b"]]:
        """The rows, some at a time."""
        row_bytes = sum(field.dtype.itemsize * int(np.prod(field.shape, dtype=int)) for field in self.fields)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self.snapshot.n_rows, step):
            rows = start + np.flatnonzero(self.snapshot.alive[start : start + step])
            if len(rows):
                lengths = [text.lengths(rows) for text in self.texts]
                n_bytes = np.cumsum(np.sum([np.zeros(len(rows), np.int64), *lengths], axis=0))
                yield from np.split(rows, 1 + np.flatnonzero(np.diff(n_bytes // BLOCK_BYTES)))

    def blocks(self) -> Iterator[Block]:
        """All columns of the rows, some rows at a time."""
        first = 0
        for rows in self.row_blocks():
            values: dict[str, Any] = {field.name: field.take(rows) for field in self.fields}
            values |= {text.name: text.take(rows).decoded() for text in self.texts}
            if "tags" in values:
                values["tags"] = [tags_of(tags) for tags in values["tags"]]
            yield block_of(first, values)
            first += len(rows)

    @cached_property
    def _alive(self) -> list[Bool[ndarray, " _"]]:
        """Which rows of each segment are not forgotten."""
        ends = np.cumsum([len(table["ids"]) for table in self.snapshot.tables])
        return np.split(self.snapshot.alive, ends)[:-1]

    def _text_field(self, name: str, parts: list[Texts]) -> TextField:
        def lengths(rows: Int64[ndarray, " b"]) -> Int64[ndarray, " b"]:
            runs = self.snapshot.by_segment(rows)[0]
            return np.concatenate([_lengths(part, some) for part, some in zip(parts, runs, strict=True)])

        def take(rows: Int64[ndarray, " b"]) -> Texts:
            runs = self.snapshot.by_segment(rows)[0]
            return Texts.joined([part.take(some) for part, some in zip(parts, runs, strict=True)])

        alive = map(np.flatnonzero, self._alive)
        n_bytes = sum(int(_lengths(part, some).sum()) for part, some in zip(parts, alive, strict=True))
        return TextField(name, n_bytes, lengths, self._told(take))

    def _told(self, take: Callable[[Int64[ndarray, " b"]], _Taken]) -> Callable[[Int64[ndarray, " b"]], _Taken]:
        def telling(rows: Int64[ndarray, " b"]) -> _Taken:
            values = take(rows)
            self.advance(len(rows))
            return values

        return telling

    def _field(self, name: str, column: Column) -> Field:
        m = self.snapshot.manifest.top_m or 1
        dtype, shape = self.snapshot.layout.columns(m)[name]
        if self.snapshot.layout.log_scale is None or name not in TOP_M[1:]:
            return Field(name, dtype, shape, column.take)
        return Field(name, np.dtype(np.float32), shape, lambda rows: self._portable(rows)[TOP_M.index(name) - 1])

    def _portable(self, rows: Int64[ndarray, " b"]) -> tuple[ndarray, ndarray]:
        scale = self.snapshot.layout.log_scale
        assert scale is not None
        listed, rest = (self.snapshot.column(name).take(rows) for name in TOP_M[1:])
        return scale.portable(listed, rest)


def _lengths(texts: Texts, rows: Int64[ndarray, " b"]) -> Int64[ndarray, " b"]:
    return texts.ends[rows] - np.where(rows > 0, texts.ends[np.maximum(rows - 1, 0)], 0)
