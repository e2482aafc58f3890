"""Built indexes kept beside the rows of a memory.

    index-GENERATION-FIRST-ROWS-RANDOM.json     what was built of which rows, and its files; written last
    index-GENERATION-FIRST-ROWS-RANDOM-K.bin    the engine's own bytes

They are derived: no manifest names them, and what is damaged, cut, of other rows or of another engine is as good as
not there. Checksums tell damage, not malice: an engine reads its bytes in native code.
"""

import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from residual_memory.errors import CorruptFile, StorageFailure
from residual_memory.memory.format import canonical, checked_body, record_of
from residual_memory.memory.snapshot import Snapshot
from residual_memory.memory.storage import Directory, FileRecord
from residual_memory.memory.tensors import is_whole

PREFIX = "index-"
SAVED_FORMAT = 2
MAX_DESCRIPTION = 1 << 20
SAMPLED_ROWS = 256

_STEM = r"index-(\d{8,})-\d{12,}-\d{12,}-[0-9a-f]{8}"
_DESCRIPTION = re.compile(_STEM + r"\.json")

Pieces = Mapping[str, bytes | memoryview]


@dataclass(frozen=True)
class BuiltPart:
    """An index over some rows that an engine built, on its way to the disk.

    Attributes
    ----------
    name, first, n_rows, description, measured : as in `SavedPart`.
    pieces : gives the engine's bytes; not called where they lie there already.
    """

    name: str
    first: int
    n_rows: int
    description: str
    measured: Mapping[str, Any] | None
    pieces: Callable[[], Pieces]


@dataclass(frozen=True)
class SavedPart:
    """An index over rows `first` … `first + n_rows − 1` of one generation.

    Attributes
    ----------
    file : its description's.
    name : what was built, and by which version of which engine.
    generation : in which the numbers of the rows hold.
    sample : checksum of some of the keys.
    description : engine and options when it was saved, for people.
    measured : what the engine measured of it, as JSON values.
    pieces : the engine's names of its files.
    """

    file: str
    name: str
    generation: int
    first: int
    n_rows: int
    sample: int
    description: str
    measured: Mapping[str, Any] | None
    pieces: Mapping[str, FileRecord]

    @property
    def end(self) -> int:
        return self.first + self.n_rows


def saved_parts(directory: Directory, snapshot: Snapshot) -> list[SavedPart]:
    """The parts that are of this snapshot's rows, by their first row, the longest first; their files are unchecked."""
    try:
        found = [_described(directory, name) for name in _descriptions(directory)]
    except StorageFailure:
        return []
    fitting = [part for part in found if part is not None and _fits(part, snapshot)]
    return sorted(fitting, key=lambda part: (part.first, -part.n_rows))


def read_part(directory: Directory, part: SavedPart) -> Pieces | None:
    """The engine's bytes, each compared with its checksum; None where one is not as it was written."""
    try:
        return {piece: directory.content(record) for piece, record in part.pieces.items()}
    except (CorruptFile, StorageFailure):
        return None


def write_part(directory: Directory, snapshot: Snapshot, built: BuiltPart) -> SavedPart:
    """Keep what an engine built, durably; on any failure nothing of it stays.

    Raises
    ------
    StorageFailure : if the disk refuses.
    """
    pieces = built.pieces()
    stem = f"{PREFIX}{snapshot.generation:08d}-{built.first:012d}-{built.n_rows:012d}-{secrets.token_hex(4)}"
    files = {piece: f"{stem}-{place}.bin" for place, piece in enumerate(pieces)}
    file = f"{stem}.json"
    try:
        records = {
            piece: directory.write(name, [pieces[piece]], memoryview(pieces[piece]).nbytes)
            for piece, name in files.items()
        }
        part = SavedPart(
            file=file,
            name=built.name,
            generation=snapshot.generation,
            first=built.first,
            n_rows=built.n_rows,
            sample=_sample(snapshot, built.first, built.n_rows),
            description=built.description,
            measured=built.measured,
            pieces=records,
        )
        content = canonical({"format": SAVED_FORMAT, **asdict(part)})
        directory.write(file, [content], len(content))
    except BaseException:
        _remove(directory, [file, *files.values()])
        raise
    return part


def is_whole_part(directory: Directory, part: SavedPart) -> bool:
    """Whether its files are as they were written."""
    try:
        return all(directory.check(record) is None for record in part.pieces.values())
    except StorageFailure:
        return False


def remove_part(directory: Directory, part: SavedPart) -> None:
    """Remove its description and then its files."""
    _remove(directory, [part.file, *(record.name for record in part.pieces.values())])


def sweep(directory: Directory, generation: int, kept: Iterable[SavedPart] | None = None) -> None:
    """Remove what `stale` names."""
    for name in stale(directory, generation, kept):
        directory.remove(name)


def stale(directory: Directory, generation: int, kept: Iterable[SavedPart] | None = None) -> list[str]:
    """What is of another generation or lacks a file, and the files that no description names; descriptions first.

    Parameters
    ----------
    kept : name all but these; None keeps every part of the generation.
    """
    named: set[str] = set()
    described = [_described(directory, name) for name in _descriptions(directory)] if kept is None else kept
    for part in described:
        if part is not None and part.generation == generation:
            records = part.pieces.values()
            if all(directory.length(record.name) == record.length for record in records):
                named |= {part.file, *(record.name for record in records)}
    # Descriptions go first: what they name is then no part that somebody may take for whole.
    names = sorted(directory.names(), key=lambda name: not name.endswith(".json"))
    return [name for name in names if name.startswith(PREFIX) and name not in named]


def check_parts(directory: Directory) -> Iterator[tuple[str, int, str | None]]:
    """Each file of each saved index, its bytes, and what is wrong with it; None where it is as it was written."""
    for name in _descriptions(directory):
        part = _described(directory, name)
        yield name, directory.length(name) or 0, "is no description of a saved index" if part is None else None
        for record in part.pieces.values() if part else ():
            damage = directory.check(record)
            yield record.name, record.length, None if damage is None else damage.what


def _descriptions(directory: Directory) -> list[str]:
    return [name for name in directory.names() if _DESCRIPTION.fullmatch(name)]


def _described(directory: Directory, name: str) -> SavedPart | None:
    """What a description says; None where it cannot be trusted."""
    if directory.length(name) is None:
        return None  # a link, for example
    try:
        body = checked_body(directory.read(name, MAX_DESCRIPTION), name)
        if body.pop("format") != SAVED_FORMAT or body["file"] != name:
            return None
        pattern = re.escape(name.removesuffix(".json")) + r"-\d+\.bin"
        pieces = {piece: record_of(entry, pattern) for piece, entry in body.pop("pieces").items()}
        part = SavedPart(**body, pieces=pieces)
        _check(part)
        return part
    except (CorruptFile, StorageFailure, KeyError, TypeError, ValueError, AttributeError):
        return None


def _check(part: SavedPart) -> None:
    numbers: list[Any] = [part.generation, part.first, part.n_rows, part.sample]
    texts = [part.name, part.description]
    if not all(map(is_whole, numbers)) or not part.n_rows or not all(isinstance(text, str) for text in texts):
        raise ValueError("a field is not of the expected form")
    if not (part.measured is None or isinstance(part.measured, dict)):
        raise ValueError("what was measured is no object")


def _fits(part: SavedPart, snapshot: Snapshot) -> bool:
    if part.generation != snapshot.generation or part.end > snapshot.n_rows:
        return False
    return part.sample == _sample(snapshot, part.first, part.n_rows)


def _sample(snapshot: Snapshot, first: int, n_rows: int) -> int:
    """Of keys that lie evenly over the rows: another memory has others."""
    rows = first + np.unique(np.linspace(0, n_rows - 1, SAMPLED_ROWS).astype(np.int64))
    keys: Shaped[ndarray, "s d"] = snapshot.keys.take(rows)
    return zlib.crc32(f"{keys.dtype} {keys.shape}".encode() + np.ascontiguousarray(keys).tobytes())


def _remove(directory: Directory, names: Iterable[str]) -> None:
    for name in names:
        directory.remove(name)
