"""Which rows lie together in a segment: as they come in, and when a memory is compacted."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from residual_memory.memory.attributes import carried, is_attribute
from residual_memory.memory.format import Segment
from residual_memory.memory.snapshot import Snapshot, Table

SEGMENT_BYTES = 64 << 20  # compaction and builders write segments of about this size
MERGE_BYTES = 16 << 20  # small appends are merged up to this size, so that a memory has few files
FAN = 4  # segments of about one size that are merged into one: a row is written again once for each factor of 4

Part = tuple[Segment | None, Table]  # rows in a segment that is written already, or that is to be written


def in_segments(tables: Iterable[Table]) -> Iterator[Table]:
    """The same rows in tables of about `SEGMENT_BYTES`."""
    waiting: list[Table] = []
    n_bytes = 0
    for table in tables:
        waiting.append(table)
        n_bytes += bytes_of(table)
        if n_bytes >= SEGMENT_BYTES:
            yield concatenated(waiting)
            waiting, n_bytes = [], 0
    if waiting:
        yield concatenated(waiting)


def with_last(snapshot: Snapshot, table: Table) -> list[Part]:
    """All segments and then the new rows, joined with the last segments wherever `FAN` of about one size would lie."""
    sizes = [segment.n_rows for segment in snapshot.manifest.segments]
    n, row_bytes = len(table["ids"]), max(bytes_of(table) // len(table["ids"]), 1)
    first = len(sizes)
    while (alike := _last_alike(sizes[:first], n)) >= FAN - 1:
        total = n + sum(sizes[first - alike : first])
        if total * row_bytes > MERGE_BYTES:
            break
        n, first = total, first - alike
    kept: list[Part] = list(zip(snapshot.manifest.segments[:first], snapshot.tables[:first], strict=True))
    return [*kept, (None, concatenated([*snapshot.tables[first:], table]))]


def _last_alike(sizes: Sequence[int], n: int) -> int:
    """How many of the last segments are no longer than n rows, or hardly."""
    alike = 0
    while alike < len(sizes) and sizes[-1 - alike] < FAN * n:
        alike += 1
    return alike


def plan(snapshot: Snapshot) -> "list[int | Int64[ndarray, ' _']]":
    """What a compaction makes: segments that stay, by number, and between them rows that are written together."""
    made: list[int | Int64[ndarray, " _"]] = []
    waiting: list[Int64[ndarray, " _"]] = []
    row_bytes = max(sum(map(bytes_of, snapshot.tables)) // max(snapshot.n_rows, 1), 1)

    def flush() -> None:
        rows = np.concatenate([np.zeros(0, np.int64), *waiting])
        size = max(SEGMENT_BYTES // row_bytes, 1)
        made.extend(rows[start : start + size] for start in range(0, len(rows), size))
        waiting.clear()

    start = 0
    for number, segment in enumerate(snapshot.manifest.segments):
        alive = snapshot.alive[start : start + segment.n_rows]
        if alive.all() and segment.file.length >= SEGMENT_BYTES // 2:
            flush()
            made.append(number)
        else:
            waiting.append(start + np.flatnonzero(alive))
        start += segment.n_rows
    flush()
    return made


def compacted(snapshot: Snapshot, planned: "Sequence[int | Int64[ndarray, ' _']]") -> Iterator[Part]:
    """The parts of a plan."""
    for part in planned:
        if isinstance(part, int):
            yield snapshot.manifest.segments[part], snapshot.tables[part]
        else:
            yield None, table_of(snapshot, part)


def table_of(snapshot: Snapshot, rows: Int64[ndarray, " b"]) -> Table:
    """Some rows with all that they have, as they are stored; they must ascend."""
    names = [name for name in snapshot.tables[0] if not is_attribute(name)]
    columns = {name: snapshot.column(name).take(rows) for name in names}
    return {**columns, **carried(snapshot.tables, snapshot.by_segment(rows)[0])}


def concatenated(tables: Sequence[Table]) -> Table:
    """The rows of all, in order."""
    if len(tables) == 1:
        return tables[0]
    names = [name for name in tables[0] if not is_attribute(name)]
    every = [np.arange(len(table["ids"])) for table in tables]
    return {**{name: np.concatenate([table[name] for table in tables]) for name in names}, **carried(tables, every)}


def bytes_of(table: Table) -> int:
    """Bytes of the columns."""
    return sum(column.nbytes for column in table.values())
