"""One version of a memory's rows, immutable: what queries read while a writer goes on."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, Integer, Shaped
from numpy import ndarray

from residual_memory.memory.attributes import (
    Attributes,
    Texts,
    carried,
    expires_in,
    tags_of,
    texts_in,
)
from residual_memory.memory.format import Manifest
from residual_memory.memory.lookup import SegmentIds, all_ascending, find_rows
from residual_memory.memory.storage import MappedPlace, mapped_place
from residual_memory.residuals import classification_residuals, dense, regression_residuals
from residual_memory.types import TopM

BLOCK_ROWS = 1024  # whose predictions are held at a time
Table = Mapping[str, ndarray]  # the columns of one segment
_Run = tuple[slice, ndarray, ndarray]  # where in an order, the part that is read, and which of its rows


class Column:
    """One column over all segments: gathered by row, or read block by block, never joined in RAM.

    Parameters
    ----------
    parts : the column of each segment, in order.
    """

    def __init__(self, parts: Sequence[ndarray], empty: ndarray) -> None:
        self._parts = [np.asarray(part) for part in parts] or [empty]
        self._starts = np.array([0, *itertools.accumulate(len(part) for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(part.dtype for part in self._parts))

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return int(np.prod(self._parts[0].shape[1:], dtype=int))

    @property
    def whole(self) -> ndarray | None:
        """The column as one array, where it is one."""
        return self._parts[0] if len(self._parts) == 1 else None

    @property
    def n_parts(self) -> int:
        """Arrays that the column lies in."""
        return len(self._parts)

    def take(self, rows: Int64[ndarray, "..."]) -> Shaped[ndarray, "..."]:
        """The values of these rows, in their shape."""
        if len(self._parts) == 1:
            return np.take(self._parts[0], rows, axis=0)
        values = np.empty((rows.size, *self._parts[0].shape[1:]), self.dtype)
        order, runs = self._by_part(rows.ravel())
        for here, part, local in runs:
            values[order[here]] = np.take(part, local, axis=0)
        return values.reshape(rows.shape + values.shape[1:])

    def gathered(self, rows: Int64[ndarray, " m"]) -> tuple[Shaped[ndarray, "m ..."], Int64[ndarray, " m"]]:
        """The values of these rows in the order in which they are read fastest, and the place of each row's."""
        if len(self._parts) == 1:
            return np.take(self._parts[0], rows, axis=0), np.arange(len(rows))
        values = np.empty((len(rows), *self._parts[0].shape[1:]), self.dtype)
        order, runs = self._by_part(rows)
        for here, part, local in runs:
            np.take(part, local, axis=0, out=values[here], mode="clip")  # "raise" would fill a copy first
        places = np.empty(len(rows), np.int64)
        places[order] = np.arange(len(rows))
        return values, places

    def _by_part(self, rows: Int64[ndarray, " m"]) -> tuple[Int64[ndarray, " m"], Iterator[_Run]]:
        """An order that puts the rows of each part together, and the runs that they then form."""
        owners = np.searchsorted(self._starts[1:], rows, side="right").astype(np.min_scalar_type(len(self._parts)))
        order = np.argsort(owners, kind="stable")  # of one or two bytes: sorted by radix, in linear time
        ordered = rows[order]
        ends = np.cumsum(np.bincount(owners, minlength=len(self._parts)))

        def runs() -> Iterator[_Run]:
            begin = 0
            for part, start, end in zip(self._parts, self._starts, ends.tolist(), strict=False):
                if end > begin:
                    yield slice(begin, end), part, ordered[begin:end] - start
                begin = end

        return order, runs()

    def opener(self, first: int, n_rows: int) -> "Callable[[], Column]":
        """What gives some of the rows, numbered from 0, in another process, to which it can be sent.

        Rows that lie in files are read there from the files; others travel with it.
        """
        cuts = np.clip(np.array([first, first + n_rows]) - self._starts[:-1, None], 0, None).tolist()
        pieces = [part[begin:end] for part, (begin, end) in zip(self._parts, cuts, strict=True)]
        sent = [mapped_place(piece) or np.ascontiguousarray(piece) for piece in pieces if len(piece)]
        return partial(_opened, sent, np.array(self._parts[0][:0]))

    def blocks(self, size: int, first: int = 0) -> Iterator[ndarray]:
        """The rows from `first` on in blocks of at most `size`; no block spans two segments."""
        for start, part in zip(self._starts, self._parts, strict=False):
            for begin in range(max(0, first - int(start)), len(part), size):
                yield np.asarray(part[begin : begin + size])


def _opened(pieces: Sequence[ndarray | MappedPlace], empty: ndarray) -> Column:
    return Column([piece if isinstance(piece, ndarray) else piece.open() for piece in pieces], empty)


class Snapshot:
    """The rows of one version.

    Row numbers hold within one `generation`: until a compaction they only grow, and forgotten rows stay as gaps.

    Parameters
    ----------
    known : an earlier version, whose tables that are also here need not be looked at again.
    """

    def __init__(
        self,
        manifest: Manifest,
        tables: Sequence[Table],
        forgotten: Int64[ndarray, " g"],
        known: "Snapshot | None" = None,
    ) -> None:
        self.manifest = manifest
        self.tables = tuple(tables)
        self.forgotten = forgotten
        self.layout = manifest.layout
        self.version, self.generation = manifest.version, manifest.generation
        self.n_rows = manifest.n_rows
        seen = {} if known is None else dict(zip(map(id, known.tables), known._segment_ids, strict=True))
        self._segment_ids: list[SegmentIds] = [seen.get(id(table)) or SegmentIds(table["ids"]) for table in self.tables]

    def __len__(self) -> int:
        return self.n_rows - len(self.forgotten)

    def column(self, name: str) -> Column:
        dtype, shape = self.layout.columns(self.manifest.top_m or 0).get(name, (np.dtype(np.int64), ()))
        return Column([table[name] for table in self.tables], np.zeros((0, *shape), dtype))

    @cached_property
    def keys(self) -> Column:
        return self.column("keys")

    @cached_property
    def id_column(self) -> Column:
        """The id of every row, to be taken row by row: `all_ids` joins them in RAM."""
        return self._named("ids", self.manifest.id_kind)

    @cached_property
    def group_column(self) -> Column | None:
        """The group of every row, likewise; None for a memory without groups."""
        kind = self.manifest.group_kind
        return None if kind is None else self._named("groups", kind)

    @cached_property
    def alive(self) -> Bool[ndarray, " n"]:
        """Which rows are not forgotten."""
        alive = np.ones(self.n_rows, bool)
        alive[self.forgotten] = False
        return alive

    @cached_property
    def all_ids(self) -> Shaped[ndarray, " n"]:
        """The id of every row, forgotten ones too."""
        return self._joined("ids", self.manifest.id_kind)

    @cached_property
    def all_groups(self) -> Shaped[ndarray, " n"] | None:
        """The group of every row; None for a memory without groups."""
        kind = self.manifest.group_kind
        return None if kind is None else self._joined("groups", kind)

    @cached_property
    def ids(self) -> Shaped[ndarray, " n"]:
        """The ids of the rows that are not forgotten, in row order."""
        return self.all_ids[self.alive] if len(self.forgotten) else self.all_ids

    @cached_property
    def tie_ranks(self) -> Int64[ndarray, " n"] | None:
        """Place of each row's id among all ids, by which equal distances are ordered; None where rows are in order."""
        if all_ascending(self._segment_ids):
            return None
        ids = self.all_ids
        ranks = np.empty(len(ids), np.int64)
        ranks[np.argsort(ids, kind="stable")] = np.arange(len(ids))
        return ranks

    def rows_of(self, ids: Shaped[ndarray, " b"]) -> Int64[ndarray, " b"]:
        """The row of each id; −1 for one that is not held, or forgotten."""
        if not self.tables or self.tables[0]["ids"].dtype.kind != ids.dtype.kind:
            return np.full(len(ids), -1)
        return find_rows(self._segment_ids, self.alive, ids)

    def groups(self, rows: Int64[ndarray, " b"]) -> list[Any]:
        """The group of each of these rows; None in a memory without groups."""
        column = self.group_column
        return [None] * len(rows) if column is None else column.take(rows).tolist()

    def attributes(self, rows: Int64[ndarray, " b"]) -> Attributes:
        """What these rows carry beside the numbers."""
        runs, places = self.by_segment(rows)
        columns = carried(self.tables, runs)
        n = len(rows)
        texts = {name: texts_in(columns, name, n).take(places).decoded() for name in ("owners", "tags", "snippets")}
        tags = [tags_of(text) for text in texts["tags"]]
        return Attributes(texts["owners"], expires_in(columns, n)[places], tags, texts["snippets"])

    def texts(self, name: str) -> Texts:
        """A text of every row, forgotten ones too: "owners", "tags" or "snippets"."""
        return Texts.joined([Texts.none(0), *(texts_in(table, name, len(table["ids"])) for table in self.tables)])

    @property
    def expires(self) -> Int64[ndarray, " n"]:
        """When every row expires, forgotten ones too."""
        parts = [expires_in(table, len(table["ids"])) for table in self.tables]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def by_segment(self, rows: Int64[ndarray, " b"]) -> tuple[list[ndarray], Int64[ndarray, " b"]]:
        """The rows of each segment by their number in it, and where each of the rows lies when these are joined."""
        ends = np.cumsum([0, *(len(table["ids"]) for table in self.tables)])
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], ends)
        runs = [rows[order[a:b]] - start for a, b, start in zip(cuts, cuts[1:], ends, strict=False)]
        places = np.empty(len(rows), np.int64)
        places[order] = np.arange(len(rows))
        return runs, places

    def residuals(self, rows: Int64[ndarray, " b"], temperature: float) -> Float[ndarray, "b c"]:
        """What the base could not learn of these rows."""
        targets, predictions = self.targets(rows), self.predictions(rows)
        if self.layout.task == "regression":
            return regression_residuals(targets, predictions)
        return classification_residuals(targets, predictions, temperature)

    def residual_sizes(self, rows: Int64[ndarray, " b"]) -> Float[ndarray, " b"]:
        """What the base missed of each row: 1 minus its probability of the label, or the distance of its value."""
        sizes = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            sizes[here] = self._missed(rows[here])
        return np.maximum(sizes, 0)

    def _missed(self, rows: Int64[ndarray, " b"]) -> Float[ndarray, " b"]:
        targets = self.targets(rows)
        if self.layout.task == "regression":
            return np.linalg.norm(targets - self.predictions(rows), axis=1)
        if self.layout.residuals == "dense":
            return 1 - self.predictions(rows)[np.arange(len(rows)), targets]
        said = self.top_m(rows)
        listed = said.indices == targets[:, None]
        beyond = said.rest / max(self.layout.n_outputs - listed.shape[1], 1)
        return 1 - np.where(listed.any(axis=1), (said.probabilities * listed).sum(axis=1), beyond)

    def predictions(self, rows: Int64[ndarray, "*b"]) -> Float[ndarray, "*b c"]:
        """What the base said of these rows, at temperature 1, as whole distributions."""
        if self.layout.residuals == "dense":
            return _computable(self.column("predictions").take(rows))
        return dense(self.top_m(rows), self.layout.n_outputs)

    def top_m(self, rows: Int64[ndarray, "..."]) -> TopM:
        """The top-m predictions of these rows, in their shape, as numbers to compute with however they are stored."""
        names = ("indices", "probabilities", "rest")
        indices, listed, rest = (self.column(name).take(rows) for name in names)
        if scale := self.layout.log_scale:
            listed, rest = scale.decoded(listed, rest)
        return TopM(_as_classes(indices), _computable(listed), _computable(rest))

    def targets(self, rows: Int64[ndarray, "..."]) -> Shaped[ndarray, "..."]:
        """The labels of these rows: class indices, or target values [… c]."""
        labels = self.column("labels").take(rows)
        return _computable(labels) if self.layout.task == "regression" else _as_classes(labels)

    def _joined(self, name: str, kind: str | None) -> ndarray:
        return np.concatenate([table[name] for table in self.tables] or [_no_names(kind)])

    def _named(self, name: str, kind: str | None) -> Column:
        return Column([table[name] for table in self.tables], _no_names(kind))


def _no_names(kind: str | None) -> ndarray:
    return np.zeros(0, "U1" if kind == "string" else np.int64)


def _as_classes(indices: Integer[ndarray, "..."]) -> Int32[ndarray, "..."]:
    """Two unsigned bytes are for storage: a sum with −1 would wrap around."""
    return indices.astype(np.int32, copy=False)


def _computable(values: ndarray) -> ndarray:
    """Half precision is for storage: arithmetic is in float32 at least."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
