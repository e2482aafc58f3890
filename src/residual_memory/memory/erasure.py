"""That rows are erased: the search for their bytes in every file, and the certificate that says what was done.

A certificate is canonical JSON under a checksum, which tells damage and not forgery: nobody signs it.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt8, UInt64
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import CorruptFile, MemoryNotFound
from residual_memory.memory.attributes import ENDS, TEXTS
from residual_memory.memory.format import canonical, checked_body, segment_header
from residual_memory.memory.snapshot import Snapshot, Table
from residual_memory.memory.storage import LOCK, RESERVE, Directory, whole_file
from residual_memory.validation import as_ids

CERTIFICATE_FORMAT = 1
MAX_CERTIFICATE = 1 << 26
WINDOW = 8  # bytes of a trace that are looked for at every place
LEAST_DISTINCT = 4  # different bytes in a window: plainer ones are found everywhere
BLOCK = 1 << 22
_SEARCHED = ("keys", "predictions", "probabilities", "ids", "groups", "labels", *TEXTS)
_BITS = 20
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Search:
    """What was looked for in the files, and what was found.

    Attributes
    ----------
    traces : byte strings of the erased rows: keys, predictions, names and texts.
    too_plain : traces left out since they are too short or too plain to tell, such as a key of zeros.
    shared : finds that are remaining rows' own values of the same kind: equal to an erased row's to the last bit, or
        next to each other, as where few probabilities are taken by all.
    found : finds that are not; 0 where the rows are erased.
    files, bytes : that were read, all those in the directory.
    """

    traces: int
    too_plain: int
    shared: int
    found: int
    files: int
    bytes: int


@dataclass(frozen=True)
class Certificate:
    """What was erased from a memory, when, and how that was checked.

    Attributes
    ----------
    memory : the name of its directory; None in RAM.
    at : when, in UTC.
    library : version of this library.
    version_before, version : of the memory, before and after.
    erased : number of rows.
    ids_sha256 : of their ids, sorted, one a line: `names` compares.
    rows : that the memory holds now.
    files_removed : files that held them, and saved indexes that were built with them.
    search : for the rows' bytes in every file; None where it was not asked for.
    remains : what else was made with the rows and is not undone by this.
    """

    memory: str | None
    at: str
    library: str
    version_before: int
    version: int
    erased: int
    ids_sha256: str
    rows: int
    files_removed: tuple[str, ...]
    search: Search | None
    remains: tuple[str, ...]

    def names(self, ids: ArrayLike) -> bool:
        """Whether it is of just these rows."""
        return ids_digest(as_ids(np.atleast_1d(np.asarray(ids)))) == self.ids_sha256

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, durably.

        Raises
        ------
        StorageFailure : if the disk refuses; nothing of it is there then.
        """
        with whole_file(Path(path)) as file:
            file.write(canonical({"format": CERTIFICATE_FORMAT, **asdict(self)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Certificate":
        """Read one back.

        Raises
        ------
        MemoryNotFound : if there is no such file.
        CorruptFile : if it is not, to the byte, what was saved.
        """
        file = Path(path)
        if not file.is_file():
            raise MemoryNotFound(f"there is no certificate at {path}")
        if file.stat().st_size > MAX_CERTIFICATE:
            raise CorruptFile(f"{path} is larger than any certificate")
        body = checked_body(file.read_bytes(), str(path))
        try:
            if body.pop("format") != CERTIFICATE_FORMAT:
                raise ValueError("its format is another one")
            search = body.pop("search")
            body |= {name: tuple(body[name]) for name in ("files_removed", "remains")}
            return Certificate(**body, search=None if search is None else Search(**search))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFile(f"{path} is no certificate: {error!r}") from error


def ids_digest(ids: Shaped[ndarray, " g"]) -> str:
    """SHA-256 of ids, sorted, one a line."""
    return hashlib.sha256("".join(f"{name}\n" for name in np.sort(ids).tolist()).encode()).hexdigest()


def what_remains(snapshot: Snapshot) -> tuple[str, ...]:
    """What was made with rows and outlives their erasure, for people."""
    source = snapshot.manifest.source or {}
    remains = ["the base model, if it was trained on the rows, still holds what it learned of them"]
    if snapshot.manifest.setting is not None:
        remains.append("the saved setting may have been chosen with the rows in the memory; tune again to undo that")
    if source.get("projection"):
        remains.append("the projection of the keys was fitted on rows of the first build; build again to undo that")
    remains.append(
        "readers that opened the memory before keep the removed files until they refresh or close; "
        "backups, file-system snapshots and the disk's own blocks are beyond this library"
    )
    return tuple(remains)


# ---------------------------------------------------------------------- the bytes of rows


@dataclass(frozen=True)
class Traces:
    """Byte strings to look for, and in each the window by which it is found.

    Attributes
    ----------
    whole : the byte strings, no two alike.
    columns : those that each is a value of, in one erased row or another.
    windows : eight bytes of each as one number.
    places : where in the byte string the window is.
    too_plain : byte strings without a window that tells anything.
    """

    whole: list[bytes]
    columns: list[frozenset[str]]
    windows: UInt64[ndarray, " w"]
    places: Int64[ndarray, " w"]
    too_plain: int


def traces_of(snapshot: Snapshot, rows: Int64[ndarray, " g"]) -> Traces:
    """The bytes of these rows as they lie in the files."""
    strings: dict[bytes, frozenset[str]] = {}
    for table, some in zip(snapshot.tables, snapshot.by_segment(rows)[0], strict=True):
        for name in _SEARCHED:
            if name in table and len(some):
                for text in _bytes_of(table, name, some):
                    strings[text] = strings.get(text, frozenset()) | {name}
    chosen = {text: place for text in strings if (place := _telling(text)) is not None}
    windows = np.array([int.from_bytes(t[p : p + WINDOW], "little") for t, p in chosen.items()], np.uint64)
    order = np.argsort(windows)
    whole = list(chosen)
    return Traces(
        [whole[place] for place in order],
        [strings[whole[place]] for place in order],
        windows[order],
        np.array(list(chosen.values()), np.int64)[order],
        len(strings) - len(chosen),
    )


def _bytes_of(table: Table, name: str, rows: Int64[ndarray, " b"]) -> Iterator[bytes]:
    column = table[name]
    if name in TEXTS:
        ends = table[name + ENDS]
        starts = np.concatenate([[0], ends[:-1]])
        return (column[a:b].tobytes() for a, b in zip(starts[rows].tolist(), ends[rows].tolist(), strict=True))
    if column.dtype.kind == "U":
        return (text.encode() for text in column[rows].tolist())
    return (column[row].tobytes() for row in rows.tolist())


def _telling(text: bytes) -> int | None:
    """Where the window with the most different bytes begins; None where even that has too few."""
    if len(text) < WINDOW:
        return None
    best = max(range(0, len(text) - WINDOW + 1, WINDOW), key=lambda place: len(set(text[place : place + WINDOW])))
    return best if len(set(text[best : best + WINDOW])) >= LEAST_DISTINCT else None


def search(directory: Directory, snapshot: Snapshot, traces: Traces) -> Search:
    """Look for the traces in every file of the directory, at every place.

    Parameters
    ----------
    snapshot : the memory as it is now: a find that is a row's own value is told apart.

    Raises
    ------
    StorageFailure : if a file cannot be read.
    """
    names = [name for name in directory.names() if name not in (LOCK, RESERVE) and directory.length(name) is not None]
    own = {segment.file.name: segment for segment in snapshot.manifest.segments}
    shared = found = 0
    filter_ = _filter(traces.windows)
    for name in names:
        finds = list(_finds(directory, name, traces, filter_)) if traces.whole else []
        if finds and name in own:
            header = segment_header(directory, own[name].file)
            spans = {
                column: (header.start + entry.first, header.start + entry.last)
                for column, entry in header.entries.items()
            }
            theirs = sum(
                any(_is_value(spans, column, at, len(traces.whole[which])) for column in traces.columns[which])
                for at, which in finds
            )
            shared, found = shared + theirs, found + len(finds) - theirs
        else:
            found += len(finds)
    n_bytes = sum(directory.length(name) or 0 for name in names)
    return Search(len(traces.whole), traces.too_plain, shared, found, len(names), n_bytes)


def _is_value(spans: "dict[str, tuple[int, int]]", column: str, at: int, length: int) -> bool:
    """Whether a find is of remaining rows' values of the column, one or several, and not bytes that lie astray."""
    first, last = spans.get(column, (0, -1))
    return first <= at <= last - length


def _filter(windows: UInt64[ndarray, " w"]) -> Bool[ndarray, " b"]:
    marks = np.zeros(1 << _BITS, bool)
    marks[_hashed(windows)] = True
    return marks


def _hashed(windows: UInt64[ndarray, " w"]) -> UInt64[ndarray, " w"]:
    return (windows * _ODD) >> np.uint64(64 - _BITS)


def _finds(directory: Directory, name: str, traces: Traces, marks: Bool[ndarray, " b"]) -> Iterator[tuple[int, int]]:
    """Where in the file a trace begins, and which one."""
    longest = max(map(len, traces.whole))
    overlap = 2 * longest
    seen: set[tuple[int, int]] = set()
    before = 0  # bytes of the file before this block
    for block in directory.blocks(name, max(BLOCK, 4 * overlap), overlap):
        content: UInt8[ndarray, " bytes"] = np.frombuffer(block, np.uint8)
        for at, which in _finds_in(content, block, traces, marks):
            if (before + at, which) not in seen:
                seen.add((before + at, which))
                yield before + at, which
        seen = {entry for entry in seen if entry[0] >= before + len(block) - overlap}
        before += max(len(block) - overlap, 0)


def _finds_in(
    content: UInt8[ndarray, " bytes"], block: bytes, traces: Traces, marks: Bool[ndarray, " b"]
) -> Iterator[tuple[int, int]]:
    for shift in range(WINDOW):
        whole = (len(content) - shift) // WINDOW
        if whole <= 0:
            continue
        words = np.frombuffer(block, "<u8", whole, shift)
        near = np.flatnonzero(marks[_hashed(words)])
        for place in near[np.isin(words[near], traces.windows)].tolist():
            yield from _whole_finds(block, shift + WINDOW * place, words[place], traces)


def _whole_finds(block: bytes, place: int, window: np.uint64, traces: Traces) -> Iterator[tuple[int, int]]:
    first = int(np.searchsorted(traces.windows, window))
    while first < len(traces.windows) and traces.windows[first] == window:
        at = place - int(traces.places[first])
        text = traces.whole[first]
        if at >= 0 and block[at : at + len(text)] == text:
            yield at, first
        first += 1


def files_gone(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """Files that were there and are not any more."""
    return tuple(sorted(set(before) - set(after)))
