"""From the files of a memory to the rows of its newest version."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from residual_memory.errors import CorruptFile, StorageFailure
from residual_memory.memory.format import (
    ATTRIBUTES,
    MANIFEST,
    MAX_MANIFEST,
    Columns,
    Manifest,
    Segment,
    decoded_strings,
    open_segment,
    segment_columns,
    segment_header,
)
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import Directory, FileRecord

NAMES = ("ids", "groups")
GONE_ROWS: Columns = {"rows": (np.dtype(np.int64), ())}
GONE_BITS: Columns = {"bits": (np.dtype(np.uint8), ())}


def read_manifest(directory: Directory, name: str = MANIFEST) -> Manifest:
    """What is true of a memory.

    Raises
    ------
    CorruptFile, UnsupportedFormat : if the file cannot be trusted, or understood.
    """
    return Manifest.from_bytes(directory.read(name, MAX_MANIFEST), str(directory.path / name))


def read_snapshot(directory: Directory, known: Snapshot | None = None, attempts: int = 20) -> Snapshot:
    """The newest committed version; files of `known` are not opened again.

    Raises
    ------
    CorruptFile, UnsupportedFormat, StorageFailure : if it cannot be read.
    """
    tables = {} if known is None else dict(zip((s.file for s in known.manifest.segments), known.tables, strict=True))
    for attempt in range(attempts):
        content = directory.read(MANIFEST, MAX_MANIFEST)
        manifest = Manifest.from_bytes(content, str(directory.path / MANIFEST))
        try:
            opened = [tables.get(s.file) or rows_of(directory, manifest, s) for s in manifest.segments]
            return Snapshot(manifest, opened, forgotten_of(directory, manifest), known)
        except (CorruptFile, StorageFailure):
            # A compaction between the two reads removes files that the newer manifest no longer names.
            if attempt + 1 < attempts and directory.read(MANIFEST, MAX_MANIFEST) != content:
                continue
            raise
    raise CorruptFile(f"{directory.path} changes faster than it can be read")


def rows_of(directory: Directory, manifest: Manifest, segment: Segment) -> Table:
    """The columns of a segment of rows.

    Raises
    ------
    CorruptFile : if they are not those that the manifest tells of.
    """
    return decoded_names(columns_of(directory, manifest, segment), directory.path / segment.file.name)


def columns_of(directory: Directory, manifest: Manifest, segment: Segment) -> dict[str, ndarray]:
    """The columns of a segment of rows as they lie in its file: ids and groups that are strings as bytes."""
    return open_segment(directory, segment, segment_columns(manifest), ATTRIBUTES)


def decoded_names(columns: dict[str, ndarray], where: Path) -> Table:
    """The columns with ids and groups as strings where they are that.

    Raises
    ------
    CorruptFile : if they are no text.
    """
    coded = [name for name in NAMES if name in columns and columns[name].dtype == np.uint8]
    return {**columns, **{name: _decoded(columns[name], where) for name in coded}}


def forgotten_of(directory: Directory, manifest: Manifest) -> Int64[ndarray, " g"]:
    """The rows that are forgotten, ascending.

    Raises
    ------
    CorruptFile : if the file does not name that many rows of the memory.
    """
    if manifest.forgotten is None:
        return np.zeros(0, np.int64)
    file, n_rows = manifest.forgotten.file, manifest.forgotten.n_rows
    gone = forgotten_in(directory, file)
    outside = len(gone) and (gone[0] < 0 or gone[-1] >= manifest.n_rows or (gone[1:] <= gone[:-1]).any())
    if outside or len(gone) != n_rows:
        raise CorruptFile(f"{directory.path / file.name} names rows that the memory does not have")
    return gone


def forgotten_in(directory: Directory, file: FileRecord) -> Int64[ndarray, " g"]:
    """The rows that a file names as forgotten.

    Raises
    ------
    CorruptFile : if it names none.
    """
    entries = segment_header(directory, file).entries
    columns = GONE_BITS if set(entries) == set(GONE_BITS) else GONE_ROWS
    n = max((entry.shape[0] for entry in entries.values() if entry.shape), default=0)
    found = open_segment(directory, Segment(file, n), columns)
    return np.flatnonzero(np.unpackbits(found["bits"])) if "bits" in found else np.array(found["rows"])


def forgotten_table(rows: Int64[ndarray, " g"], n_rows: int) -> Table:
    """Forgotten rows as they are stored: by number, or with a bit for each row where that is shorter."""
    if 64 * len(rows) <= n_rows:
        return {"rows": rows}
    marks = np.zeros(n_rows, bool)
    marks[rows] = True
    return {"bits": np.packbits(marks)}


def _decoded(encoded: ndarray, where: Path) -> ndarray:
    try:
        return decoded_strings(encoded)
    except UnicodeDecodeError as error:
        raise CorruptFile(f"{where} holds ids or groups that are no text: {error}") from error
