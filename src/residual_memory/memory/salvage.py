"""What can be saved of a damaged memory: every row of which no byte lies in a damaged place."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from residual_memory.errors import CorruptFile, MemoryNotFound, ResidualMemoryError
from residual_memory.memory.attributes import ENDS, TEXTS
from residual_memory.memory.checking import Problem
from residual_memory.memory.format import COPY, MANIFEST, Manifest, Segment, segment_header
from residual_memory.memory.memory import filled, require_empty
from residual_memory.memory.reading import forgotten_in, forgotten_of, read_manifest, rows_of
from residual_memory.memory.segments import table_of
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import Damage, Directory, FileRecord, move, part_of


@dataclass(frozen=True)
class Salvage:
    """What was saved.

    Attributes
    ----------
    rows : in the new memory.
    lost : rows that the damaged memory held and the new one does not.
    problems : what was wrong, file by file.
    """

    rows: int
    lost: int
    problems: tuple[Problem, ...]


def salvage(path: str | os.PathLike[str], to: str | os.PathLike[str], *, keep_forgotten: bool = False) -> Salvage:
    """Make a new memory of all rows of a damaged one that are as they were written. The damaged one is not changed.

    Where the manifest is damaged its copy is read, which is the same unless the last writer was cut off; a change that
    the copy does not know of is lost, but for what was forgotten.

    Parameters
    ----------
    path : the damaged memory.
    to : a new or empty directory.
    keep_forgotten : where it cannot be read which rows were forgotten, save all rows; by default that is refused.

    Raises
    ------
    MemoryNotFound : if there is no memory at the path.
    CorruptFile : if neither manifest nor copy can be read, or it cannot be told which rows were forgotten.
    InvalidInput : if `to` holds something already.
    """
    directory = Directory(path)
    if not directory.exists():
        raise MemoryNotFound(f"there is no memory at {path}")
    require_empty(to)
    manifest, problems = _manifest(directory)
    damages = directory.check_all(manifest.files())
    problems += [Problem(name, damage.what) for name, found in damages.items() for damage in found]
    forgotten = _forgotten(directory, manifest, damages, keep_forgotten)
    alive = np.ones(manifest.n_rows, bool)
    alive[forgotten] = False
    parts = [(s, *_rows(directory, manifest, s, damages[s.file.name])) for s in manifest.segments]
    part = part_of(Path(to).absolute())
    try:
        with filled(part, manifest, _saved(manifest, parts, alive)) as memory:
            rows = len(memory)
        move(part, Path(to))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Salvage(rows, int(alive.sum()) - rows, tuple(problems))


def _manifest(directory: Directory) -> tuple[Manifest, list[Problem]]:
    try:
        return read_manifest(directory), []
    except ResidualMemoryError as error:
        problem = Problem(MANIFEST, f"cannot be read: {error}")
        try:
            return read_manifest(directory, COPY), [problem]
        except ResidualMemoryError as other:
            raise CorruptFile(f"{error}, and so is its copy: {other}; restore one of them from a backup") from None


def _forgotten(
    directory: Directory, manifest: Manifest, damages: dict[str, list[Damage]], keep: bool
) -> Int64[ndarray, " g"]:
    """Rows that were forgotten, by the manifest and by a later change that a copy of the manifest does not know of."""
    rows = [np.zeros(0, np.int64)]
    segment = manifest.forgotten
    try:
        if segment is not None and damages[segment.file.name]:
            raise CorruptFile(f"{directory.path / segment.file.name} is damaged")
        rows.append(forgotten_of(directory, manifest))
        for name in directory.names():
            if name.startswith("gone-") and int(name.split("-")[1]) > manifest.version:
                rows.append(_unnamed(directory, manifest, name))
    except CorruptFile as error:
        if not keep:
            raise CorruptFile(
                f"{error}, so that nobody knows which rows were forgotten; save all of them with keep_forgotten=True"
            ) from None
        return np.zeros(0, np.int64)
    return np.unique(np.concatenate(rows))


def _unnamed(directory: Directory, manifest: Manifest, name: str) -> Int64[ndarray, " g"]:
    """The forgotten rows in a file that the manifest at hand does not name, of those that it knows."""
    rows = forgotten_in(directory, FileRecord(name, directory.length(name) or 0, 1, ()))
    return rows[(rows >= 0) & (rows < manifest.n_rows)]


def _rows(
    directory: Directory, manifest: Manifest, segment: Segment, damages: list[Damage]
) -> tuple[Table | None, Bool[ndarray, " n"]]:
    """The columns of a segment, and which of its rows are as they were written."""
    whole = np.zeros(segment.n_rows, bool)
    try:
        table = rows_of(directory, manifest, segment)
        header = segment_header(directory, segment.file)
    except ResidualMemoryError:
        return None, whole
    whole[:] = True
    for damage in damages:
        for name, entry in header.entries.items():
            first, last = (place - header.start - entry.first for place in (damage.first, damage.last))
            if last < 0 or first >= entry.last - entry.first:
                continue
            if name in TEXTS:
                whole &= ~_touched(table[name + ENDS], first, last)
            elif name.removesuffix(ENDS) in TEXTS:
                whole[:] = False
            else:
                width = max((entry.last - entry.first) // max(segment.n_rows, 1), 1)
                whole[max(first // width, 0) : last // width + 1] = False
    return table, whole


def _touched(ends: Int64[ndarray, " n"], first: int, last: int) -> Bool[ndarray, " n"]:
    """Rows whose text has bytes from `first` to `last`."""
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    return (starts <= last) & (ends > first)


def _saved(
    manifest: Manifest, parts: "list[tuple[Segment, Table | None, Bool[ndarray, ' _']]]", alive: Bool[ndarray, " n"]
) -> Iterator[Table]:
    start = 0
    for segment, table, whole in parts:
        rows = np.flatnonzero(whole & alive[start : start + segment.n_rows])
        start += segment.n_rows
        if table is not None and len(rows):
            alone = replace(manifest, segments=(segment,), forgotten=None)
            yield table_of(Snapshot(alone, [table], np.zeros(0, np.int64)), rows)
