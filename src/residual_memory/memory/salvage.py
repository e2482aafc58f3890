"""What can be saved of a damaged memory: every row of which no byte lies in a damaged place."""

import os
import re
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
from residual_memory.memory.format import COPY, MANIFEST, SEGMENT_NAME, Manifest, Segment, segment_header
from residual_memory.memory.memory import filled, require_empty
from residual_memory.memory.reading import (
    NAMES,
    columns_of,
    decoded_names,
    forgotten_in,
    forgotten_of,
    read_manifest,
)
from residual_memory.memory.segments import table_of
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import Damage, Directory, FileRecord, part_of
from residual_memory.memory.tensors import Header, header_bytes


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
    copied = bool(problems)
    damages = directory.check_all(manifest.files())
    problems += [Problem(name, damage.what) for name, found in damages.items() for damage in found]
    forgotten = _forgotten(directory, manifest, damages, copied, keep_forgotten)
    alive = np.ones(manifest.n_rows, bool)
    alive[forgotten] = False
    parts = [(s, *_rows(directory, manifest, s, damages[s.file.name])) for s in manifest.segments]
    part = part_of(Path(to).absolute())
    try:
        with filled(part, manifest, _saved(manifest, parts, alive)) as memory:
            rows = len(memory)
        Directory(part).move(Path(to))
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
    directory: Directory, manifest: Manifest, damages: dict[str, list[Damage]], copied: bool, keep: bool
) -> Int64[ndarray, " g"]:
    """Rows that were forgotten, by the manifest and by a later change that a copy of the manifest does not know of."""
    rows = [np.zeros(0, np.int64)]
    segment = manifest.forgotten
    try:
        # Beside a manifest that is whole such a file is of a change that was never acknowledged.
        later = _later(directory, manifest) if copied else []
        if later and any(directory.length(segment.file.name) is None for segment in manifest.segments):
            raise CorruptFile(f"{directory.path / later[0]} may count rows as they are since a compaction")
        rows += [_unnamed(directory, manifest, name) for name in later]
        if segment is not None and not (later and damages[segment.file.name]):  # a later file names all of its rows
            if damages[segment.file.name]:
                raise CorruptFile(f"{directory.path / segment.file.name} is damaged")
            rows.append(forgotten_of(directory, manifest))
    except CorruptFile as error:
        if not keep:
            raise CorruptFile(
                f"{error}, so that nobody knows which rows were forgotten; save all of them with keep_forgotten=True"
            ) from None
        return np.zeros(0, np.int64)
    return np.unique(np.concatenate(rows))


def _later(directory: Directory, manifest: Manifest) -> list[str]:
    """Files of forgotten rows that are newer than the manifest at hand."""
    found = (re.fullmatch(SEGMENT_NAME, name) for name in directory.names())
    return [m[0] for m in found if m and m[1] == "gone" and int(m[0].split("-")[1]) > manifest.version]


def _unnamed(directory: Directory, manifest: Manifest, name: str) -> Int64[ndarray, " g"]:
    """The forgotten rows in a file that the manifest at hand does not name, of those that it knows."""
    rows = forgotten_in(directory, FileRecord(name, directory.length(name) or 0, 1, ()))
    return rows[(rows >= 0) & (rows < manifest.n_rows)]


def _rows(
    directory: Directory, manifest: Manifest, segment: Segment, damages: list[Damage]
) -> tuple[Table | None, Bool[ndarray, " n"]]:
    """The columns of a segment, and which of its rows are as they were written."""
    whole = np.ones(segment.n_rows, bool)
    try:
        columns = columns_of(directory, manifest, segment)
        header = segment_header(directory, segment.file)
        if any(damage.first < header.start for damage in damages) and not _is_own(directory, segment, header):
            return None, ~whole
        for damage in damages:
            whole &= ~_damaged(columns, header, damage, segment.n_rows)
        for name in NAMES:
            if name in columns and columns[name].dtype == np.uint8:
                columns[name] = np.where(whole[:, None], columns[name], 0)  # what is damaged may be no text
        return decoded_names(columns, directory.path / segment.file.name), whole
    except CorruptFile:
        return None, np.zeros(segment.n_rows, bool)


def _is_own(directory: Directory, segment: Segment, header: Header) -> bool:
    """Whether the header is to the byte the one that this library writes for such columns."""
    columns = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items() if entry.dtype is not None}
    return directory.head(segment.file.name, header.start) == header_bytes(columns)[0]


def _damaged(columns: Table, header: Header, damage: Damage, n_rows: int) -> Bool[ndarray, " n"]:
    """Rows of which a byte lies in a damaged place."""
    damaged = np.zeros(n_rows, bool)
    for name, entry in header.entries.items():
        first, last = (place - header.start - entry.first for place in (damage.first, damage.last))
        if last < 0 or first >= entry.last - entry.first:
            continue
        if name in TEXTS:
            damaged |= _touched(columns[name + ENDS], first, last)
        elif name.removesuffix(ENDS) in TEXTS:
            damaged[:] = True
        else:
            width = max((entry.last - entry.first) // max(n_rows, 1), 1)
            damaged[max(first // width, 0) : last // width + 1] = True
    return damaged


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
