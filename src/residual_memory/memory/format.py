"""What a memory looks like on disk, format 2.

    manifest.json                    the truth: what exists, with lengths and checksums; replaced as a whole
    rows-VERSION-RANDOM.safetensors  immutable segments; one tensor a column
    gone-VERSION-RANDOM.safetensors  the rows forgotten since the last compaction, by number or one bit a row
    manifest.copy                    of the manifest, not waited for: salvage reads it where the manifest is damaged
    reserve                          room that makes forgetting possible on a full disk
    lock                             of the one writer

Format 1, which is read too, has neither the history of changes nor what rows may carry (`attributes`), and forgotten
rows by number alone.

Segments are plain safetensors files (8 bytes of header length, a JSON header, the columns), so that other tools can
read them. The manifest is canonical JSON under its own checksum: a byte that differs anywhere is noticed.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, UnsupportedFormat
from residual_memory.memory.attributes import ENDS, EXPIRES, TEXTS
from residual_memory.memory.codes import LOG_SCALES, LogScale
from residual_memory.memory.storage import Directory, FileRecord
from residual_memory.memory.tensors import Column, Entry, Header, header_bytes, is_whole, read_header
from residual_memory.types import Metric, Task
from residual_memory.validation import as_count

FORMAT = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
COPY = "manifest.copy"
MAX_MANIFEST = 64 << 20
MAX_HISTORY = 100  # changes that a manifest tells of
MAX_HEADER = 1 << 20

SEGMENT_NAME = r"(rows|gone)-\d{8,}-[0-9a-f]{8}\.safetensors"
LAYOUT_OPTIONS = {
    "task": ("classification", "regression"),
    "metric": ("euclidean", "cosine"),
    "residuals": ("dense", "top-m"),
    "key_dtype": ("float16", "float32", "float64"),
    "prediction_dtype": ("float16", "float32", "float64", *LOG_SCALES),
}

Columns = dict[str, Column]  # with trailing shapes

# What rows may carry; a segment whose rows carry nothing has none of them. Texts have as many bytes as they have.
ATTRIBUTES: Columns = {
    EXPIRES: (np.dtype(np.int64), ()),
    **{name: (np.dtype(np.uint8), ()) for name in TEXTS},
    **{name + ENDS: (np.dtype(np.int64), ()) for name in TEXTS},
}


@dataclass(frozen=True)
class Layout:
    """What every row of a memory holds; fixed when the memory is created.

    Attributes
    ----------
    dim : numbers in a key.
    n_outputs : classes, or targets.
    task : "classification" or "regression".
    metric : "euclidean", or "cosine": keys are scaled to length 1, and distances are Euclidean among those.
    residuals : "dense" keeps whole base predictions, "top-m" the m largest probabilities of each.
    key_dtype, prediction_dtype : "float16", "float32" or "float64"; of top-m predictions also "log8" or "log16".
    """

    dim: int
    n_outputs: int
    task: Task
    metric: Metric
    residuals: str
    key_dtype: str
    prediction_dtype: str

    @property
    def log_scale(self) -> LogScale | None:
        """What probabilities are stored by; None where they are stored as they are."""
        return LOG_SCALES.get(self.prediction_dtype)

    @property
    def class_dtype(self) -> np.dtype[Any]:
        """Of stored class indices: in two bytes where top-m rows, which are short, allow it."""
        return np.dtype(np.uint16 if self.residuals == "top-m" and self.n_outputs <= 1 << 16 else np.int32)

    def columns(self, m: int | None) -> Columns:
        """Name, type and trailing shape of each numeric column; `m` is the top-m's, None for dense."""
        scale = self.log_scale
        prediction = np.dtype(self.prediction_dtype) if scale is None else scale.dtype
        columns: Columns = {"keys": (np.dtype(self.key_dtype), (self.dim,))}
        if self.task == "regression":
            columns["labels"] = (prediction, (self.n_outputs,))
        else:
            columns["labels"] = (self.class_dtype, ())
        if self.residuals == "dense":
            columns["predictions"] = (prediction, (self.n_outputs,))
        elif m is not None:
            columns["indices"] = (self.class_dtype, (m,))
            columns["probabilities"] = (prediction, (m,))
            columns["rest"] = (prediction, ())
        return columns

    def bytes_per_row(self, m: int | None = None) -> int:
        """Bytes that a row with an integer id takes in a segment, its header left out."""
        sizes = (dtype.itemsize * int(np.prod(shape, dtype=int)) for dtype, shape in self.columns(m).values())
        return 8 + sum(sizes)


@dataclass(frozen=True)
class Segment:
    """A segment in the manifest: its file and its number of rows."""

    file: FileRecord
    n_rows: int


@dataclass(frozen=True)
class Change:
    """One change that was committed.

    Attributes
    ----------
    version : that it made.
    at : when, in UTC.
    what : "append", "forget", "compact", "setting" or "source".
    rows : how many were added, masked or erased.
    """

    version: int
    at: str
    what: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """Everything that is true of a memory at one version."""

    layout: Layout
    library: str
    version: int = 0
    generation: int = 0  # counts compactions: row numbers hold within one generation
    id_kind: str | None = None  # "integer" or "string", set by the first rows
    group_kind: str | None = None  # likewise; None: rows have no groups
    next_id: int = 0
    top_m: int | None = None
    class_names: tuple[str, ...] | None = None
    source: Mapping[str, Any] | None = None  # of the model, layer and data that the rows come from
    setting: Mapping[str, Any] | None = None  # the tuned setting
    segments: tuple[Segment, ...] = ()
    forgotten: Segment | None = None
    created: str = field(default="")
    history: tuple[Change, ...] = ()  # the last changes, oldest first

    @property
    def n_rows(self) -> int:
        """Rows in the segments, forgotten ones too."""
        return sum(segment.n_rows for segment in self.segments)

    def __len__(self) -> int:
        return self.n_rows - (self.forgotten.n_rows if self.forgotten else 0)

    def files(self) -> list[FileRecord]:
        records = [segment.file for segment in self.segments]
        return records + ([self.forgotten.file] if self.forgotten else [])

    def with_changes(self, what: str, rows: int, at: str, **changes: Any) -> "Manifest":
        """The manifest of the next version, and the change in its history."""
        version = self.version + 1
        history = (*self.history, Change(version, at, what, rows))[-MAX_HISTORY:]
        return replace(self, version=version, history=history, **changes)

    def to_bytes(self) -> bytes:
        return canonical({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_bytes(content: bytes, where: str) -> "Manifest":
        """Read a manifest back.

        Raises
        ------
        UnsupportedFormat : if a newer library wrote it.
        CorruptFile : if it is not, to the byte, what was written.
        """
        body = checked_body(content, where)
        found = body.pop("format", None)
        if type(found) is not int or found not in READABLE:
            newer = isinstance(found, int) and found > FORMAT
            hint = "; a newer residual-memory wrote it: upgrade this one" if newer else ""
            raise UnsupportedFormat(f"{where} has format {found!r}, this library reads formats 1 to {FORMAT}{hint}")
        try:
            return _manifest_of(body)
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise CorruptFile(f"{where} is not a manifest: {error!r}") from error


def canonical(body: Mapping[str, Any]) -> bytes:
    """An object as JSON in one form alone, under a checksum."""
    inner = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(inner.encode())},\n"body":{inner}}}\n'.encode()


def check_layout(layout: Layout) -> None:
    """Refuse a layout that no memory can have.

    Raises
    ------
    InvalidInput : naming the option.
    """
    for name, allowed in LAYOUT_OPTIONS.items():
        if (found := getattr(layout, name)) not in allowed:
            raise InvalidInput(f"{name} is {found!r}, expected one of {', '.join(map(repr, allowed))}")
    as_count("dim", layout.dim)
    as_count("n_outputs", layout.n_outputs)
    if layout.task == "regression" and layout.residuals == "top-m":
        raise InvalidInput("residuals='top-m' is for classification; regression keeps 'dense' values")
    if layout.log_scale is not None and layout.residuals != "top-m":
        raise InvalidInput(
            f"prediction_dtype is {layout.prediction_dtype!r}, which residuals='top-m' alone can have; "
            "'dense' predictions take 'float16'"
        )


def checked_body(content: bytes, where: str) -> dict[str, Any]:
    """The object of `canonical`.

    Raises
    ------
    CorruptFile : if a byte differs.
    """
    try:
        parsed = json.loads(content)
        body = parsed["body"]
        if not isinstance(body, dict) or canonical(body) != content:
            raise ValueError("its checksum or its form differs")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{where} is damaged: {error}") from error
    return body


def _manifest_of(body: dict[str, Any]) -> Manifest:
    layout = Layout(**body.pop("layout"))
    check_layout(layout)
    segments, forgotten, names = body.pop("segments"), body.pop("forgotten"), body.pop("class_names")
    history = body.pop("history", [])
    if not isinstance(segments, list) or not isinstance(history, list):
        raise ValueError("segments or history are no list")
    manifest = Manifest(
        layout=layout,
        segments=tuple(_segment_of(entry) for entry in segments),
        forgotten=None if forgotten is None else _segment_of(forgotten),
        class_names=None if names is None else tuple(names),
        history=tuple(Change(**entry) for entry in history),
        **body,
    )
    _check_fields(manifest)
    return manifest


def _check_fields(manifest: Manifest) -> None:
    named = [record.name for record in manifest.files()]
    if len(set(named)) != len(named):
        raise ValueError("a file is named twice")
    for name in ("version", "generation", "next_id"):
        if not is_whole(getattr(manifest, name)):
            raise ValueError(f"{name} is no whole number")
    for name in ("id_kind", "group_kind"):
        if getattr(manifest, name) not in (None, "integer", "string"):
            raise ValueError(f"{name} is unknown")
    if manifest.segments and manifest.id_kind is None:
        raise ValueError("there are rows without a kind of ids")
    if not isinstance(manifest.library, str) or not isinstance(manifest.created, str):
        raise ValueError("library and created are no text")
    for change in manifest.history:
        whole, text = is_whole(change.version) and is_whole(change.rows), (change.at, change.what)
        if not whole or not all(isinstance(value, str) for value in text):
            raise ValueError("a change in the history is none")
    if not all(value is None or isinstance(value, dict) for value in (manifest.source, manifest.setting)):
        raise ValueError("source or setting is no object")
    if (m := manifest.top_m) is not None and (
        manifest.layout.residuals != "top-m" or not is_whole(m) or not 1 <= m <= manifest.layout.n_outputs
    ):
        raise ValueError("top_m does not fit the layout")
    names = manifest.class_names
    if names is not None and (len(names) != manifest.layout.n_outputs or not all(isinstance(n, str) for n in names)):
        raise ValueError("class_names do not fit the layout")


def _segment_of(entry: dict[str, Any]) -> Segment:
    if not is_whole(n_rows := entry["n_rows"]):
        raise ValueError("a number of rows is not a whole number")
    return Segment(record_of(entry["file"], SEGMENT_NAME), n_rows)


def record_of(entry: dict[str, Any], pattern: str) -> FileRecord:
    """What is remembered of a file whose name must be of the pattern.

    Raises
    ------
    ValueError, TypeError, KeyError : if it is not that.
    """
    record = FileRecord(**{**entry, "crc32": tuple(entry["crc32"])})
    if not isinstance(record.name, str) or not re.fullmatch(pattern, record.name):
        raise ValueError(f"{record.name!r} is not a name of such a file")
    if not all(is_whole(n) for n in (record.length, record.chunk, *record.crc32)):
        raise ValueError(f"{record.name} has a length or checksum that is not a whole number")
    if record.chunk == 0 or -(-record.length // record.chunk) != len(record.crc32):
        raise ValueError(f"{record.name} has {len(record.crc32)} checksums for {record.length} bytes")
    return record


def encoded_strings(values: ndarray) -> ndarray:
    """Strings as UTF-8 bytes [n w], padded with NUL, which no id may hold."""
    encoded = np.char.encode(values, "utf-8") if len(values) else np.zeros(0, "S1")
    width = max(encoded.dtype.itemsize, 1)
    return np.frombuffer(encoded.astype(f"S{width}").tobytes(), np.uint8).reshape(len(values), width)


def decoded_strings(encoded: ndarray) -> ndarray:
    """The strings of `encoded_strings`."""
    if not len(encoded):
        return np.zeros(0, "U1")
    width = encoded.shape[1]
    return np.char.decode(np.ascontiguousarray(encoded).view(f"S{width}")[:, 0], "utf-8")


def segment_length_and_pieces(columns: Mapping[str, ndarray]) -> tuple[int, Iterator[bytes | memoryview]]:
    """A segment file: how many bytes it has, and its content in pieces."""
    head, order = header_bytes({name: (column.dtype, column.shape) for name, column in columns.items()})

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        for name in order:
            yield np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8).data

    return len(head) + sum(column.nbytes for column in columns.values()), pieces()


def segment_columns(manifest: Manifest) -> Columns:
    """The columns that a segment of rows must have: type and trailing shape, −1 where a width is free."""
    kinds: Columns = {"integer": (np.dtype(np.int64), ()), "string": (np.dtype(np.uint8), (-1,))}
    columns = manifest.layout.columns(manifest.top_m)
    columns["ids"] = kinds[manifest.id_kind or "integer"]
    if manifest.group_kind is not None:
        columns["groups"] = kinds[manifest.group_kind]
    return columns


def open_segment(
    directory: Directory, segment: Segment, expected: Columns, optional: Columns | None = None
) -> dict[str, ndarray]:
    """The columns of a segment, memory-mapped, after checking that its header can be trusted.

    Parameters
    ----------
    expected, optional : columns that must and that may be there.

    Raises
    ------
    CorruptFile : if the file is missing, cut, or its header does not describe exactly what is there and expected.
    """
    name, where = segment.file.name, directory.path / segment.file.name
    header = segment_header(directory, segment.file)
    known = {**(optional or {}), **expected}
    found = set(header.entries)
    paired = all((column + ENDS in found) == (column in found) for column in TEXTS)
    if not set(expected) <= found <= set(known) or not paired or header.metadata:
        raise CorruptFile(f"{where} has the columns {sorted(found)}, expected {sorted(expected)}")
    for column, entry in header.entries.items():
        dtype, trailing = known[column]
        shape = (-1,) if column in TEXTS else (segment.n_rows, *trailing)
        _check_column(entry, dtype, shape, f"{where}: column {column!r}")
    return {
        column: directory.map(name, entry.dtype, entry.shape, header.start + entry.first)
        for column, entry in header.entries.items()
    }


def segment_header(directory: Directory, record: FileRecord) -> Header:
    """What a segment says of its columns.

    Raises
    ------
    CorruptFile : if the file is missing or cut, or its header does not describe what is there.
    """
    where = directory.path / record.name
    length = directory.length(record.name)
    if length != record.length:
        found = "is missing" if length is None else f"has {length:,} bytes"
        raise CorruptFile(f"{where} {found}, expected {record.length:,} bytes")
    return read_header(partial(directory.head, record.name), length, MAX_HEADER, str(where))


def _check_column(entry: Entry, dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> None:
    """Compare with the type and shape that a column must have, −1 where an axis is free."""
    fits = len(entry.shape) == len(shape) and all(b in (-1, a) for a, b in zip(entry.shape, shape, strict=True))
    if entry.dtype is None or entry.dtype != dtype or not fits:  # to numpy None is a float64
        raise CorruptFile(f"{where} is {entry.kind} {entry.shape}, expected {dtype} {shape}")
