"""What of a memory goes out: its rows that are not forgotten, column by column or block by block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped
from numpy import ndarray

from residual_memory.exchange.rows import BLOCK_BYTES, TOP_M, Block, block_of
from residual_memory.memory import Column, Memory, Snapshot
from residual_memory.progress import Advance


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


class Exported:
    """The rows of a memory as they are now, in their order; a change of the memory does not show.

    Values are those that are stored, to the last bit, but for probabilities on a log scale: they are decoded, and give
    the same codes when they are stored again.

    Attributes
    ----------
    advance : called with the number of rows whenever a block of a column was taken, for a progress bar.
    """

    def __init__(self, memory: Memory) -> None:
        self._snapshot: Snapshot = memory.snapshot
        self.n_rows = len(self._snapshot)
        self.advance: Advance = lambda values: None

    @property
    def ids(self) -> Shaped[ndarray, " n"]:
        """Of the rows, all at once."""
        return self._snapshot.ids

    @property
    def description(self) -> bytes:
        """The manifest without its files, which makes an identical memory of the same rows."""
        manifest = self._snapshot.manifest
        return replace(manifest, version=0, generation=0, segments=(), forgotten=None).to_bytes()

    @cached_property
    def fields(self) -> list[Field]:
        """The columns."""
        snapshot = self._snapshot
        columns = {name: snapshot.column(name) for name in snapshot.layout.columns(snapshot.manifest.top_m or 1)}
        names = {"ids": snapshot.id_column, "groups": snapshot.group_column}
        fields = [self._field(name, column) for name, column in columns.items()]
        fields += [Field(name, column.dtype, (), column.take) for name, column in names.items() if column is not None]
        return [replace(field, take=self._told(field.take)) for field in fields]

    def row_blocks(self) -> Iterator[Int64[ndarray, " b"]]:
        """The rows, some at a time."""
        row_bytes = sum(field.dtype.itemsize * int(np.prod(field.shape, dtype=int)) for field in self.fields)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, self._snapshot.n_rows, step):
            rows = start + np.flatnonzero(self._snapshot.alive[start : start + step])
            if len(rows):
                yield rows

    def blocks(self) -> Iterator[Block]:
        """All columns of the rows, some rows at a time."""
        first = 0
        for rows in self.row_blocks():
            yield block_of(first, {field.name: field.take(rows) for field in self.fields})
            first += len(rows)

    def _told(self, take: Callable[[Int64[ndarray, " b"]], ndarray]) -> Callable[[Int64[ndarray, " b"]], ndarray]:
        def telling(rows: Int64[ndarray, " b"]) -> ndarray:
            values = take(rows)
            self.advance(len(rows))
            return values

        return telling

    def _field(self, name: str, column: Column) -> Field:
        m = self._snapshot.manifest.top_m or 1
        dtype, shape = self._snapshot.layout.columns(m)[name]
        if self._snapshot.layout.log_scale is None or name not in TOP_M[1:]:
            return Field(name, dtype, shape, column.take)
        return Field(name, np.dtype(np.float32), shape, lambda rows: self._portable(rows)[TOP_M.index(name) - 1])

    def _portable(self, rows: Int64[ndarray, " b"]) -> tuple[ndarray, ndarray]:
        scale = self._snapshot.layout.log_scale
        assert scale is not None
        listed, rest = (self._snapshot.column(name).take(rows) for name in TOP_M[1:])
        return scale.portable(listed, rest)
