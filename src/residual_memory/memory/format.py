"""What a memory looks like on disk, format 1.

    manifest.json                    the truth: what exists, with lengths and checksums; replaced as a whole
    rows-VERSION-RANDOM.safetensors  immutable segments; one tensor a column
    gone-VERSION-RANDOM.safetensors  the rows forgotten since the last compaction
    lock                             of the one writer

Segments are plain safetensors files (8 bytes of header length, a JSON header, the columns), so that other tools can
read them. The manifest is canonical JSON under its own checksum: a byte that differs anywhere is noticed.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, UnsupportedFormat
from residual_memory.memory.storage import Directory, FileRecord
from residual_memory.types import Metric, Task

FORMAT = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20
MAX_HEADER = 1 << 20

_DTYPE_NAMES = {"<i8": "I64", "<i4": "I32", "<f8": "F64", "<f4": "F32", "<f2": "F16", "|u1": "U8"}
_DTYPES = {name: np.dtype(code) for code, name in _DTYPE_NAMES.items()}
_FLOATS = ("float16", "float32", "float64")


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
    key_dtype, prediction_dtype : "float16", "float32" or "float64".
    """

    dim: int
    n_outputs: int
    task: Task
    metric: Metric
    residuals: str
    key_dtype: str
    prediction_dtype: str

    def columns(self, m: int | None) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Name, type and trailing shape of each numeric column; `m` is the top-m's, None for dense."""
        key, prediction = np.dtype(self.key_dtype), np.dtype(self.prediction_dtype)
        columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {"keys": (key, (self.dim,))}
        if self.task == "regression":
            columns["labels"] = (prediction, (self.n_outputs,))
        else:
            columns["labels"] = (np.dtype(np.int32), ())
        if self.residuals == "dense":
            columns["predictions"] = (prediction, (self.n_outputs,))
        elif m is not None:
            columns["indices"] = (np.dtype(np.int32), (m,))
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

    def __len__(self) -> int:
        gone = self.forgotten.n_rows if self.forgotten else 0
        return sum(segment.n_rows for segment in self.segments) - gone

    def files(self) -> list[FileRecord]:
        records = [segment.file for segment in self.segments]
        return records + ([self.forgotten.file] if self.forgotten else [])

    def with_changes(self, **changes: Any) -> "Manifest":
        """The manifest of the next version."""
        return replace(self, version=self.version + 1, **changes)

    def to_bytes(self) -> bytes:
        return _canonical({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_bytes(content: bytes, where: str) -> "Manifest":
        """Read a manifest back.

        Raises
        ------
        UnsupportedFormat : if a newer library wrote it.
        CorruptFile : if it is not, to the byte, what was written.
        """
        body = _checked_body(content, where)
        if (found := body.pop("format", None)) != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            hint = "; a newer residual-memory wrote it: upgrade this one" if newer else ""
            raise UnsupportedFormat(f"{where} has format {found!r}, this library reads format {FORMAT}{hint}")
        try:
            return _manifest_of(body)
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise CorruptFile(f"{where} is not a manifest: {error!r}") from error


def _canonical(body: Mapping[str, Any]) -> bytes:
    inner = json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(inner.encode())},\n"body":{inner}}}\n'.encode()


def _checked_body(content: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
        body = parsed["body"]
        if not isinstance(body, dict) or _canonical(body) != content:
            raise ValueError("its checksum or its form differs")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{where} is damaged: {error}") from error
    return body


def _manifest_of(body: dict[str, Any]) -> Manifest:
    layout = Layout(**body.pop("layout"))
    if layout.key_dtype not in _FLOATS or layout.prediction_dtype not in _FLOATS:
        raise ValueError(f"unknown dtype in {layout}")
    segments = tuple(_segment_of(entry) for entry in body.pop("segments"))
    forgotten = body.pop("forgotten")
    names = body.pop("class_names")
    manifest = Manifest(
        layout=layout,
        segments=segments,
        forgotten=_segment_of(forgotten) if forgotten else None,
        class_names=tuple(names) if names is not None else None,
        **body,
    )
    named = [record.name for record in manifest.files()]
    if len(set(named)) != len(named):
        raise ValueError("a file is named twice")
    return manifest


def _segment_of(entry: dict[str, Any]) -> Segment:
    record = FileRecord(**{**entry["file"], "crc32": tuple(entry["file"]["crc32"])})
    plain = record.name.replace("-", "").replace(".", "").isalnum() and not record.name.startswith(".")
    if not plain or "/" in record.name or ".." in record.name:
        raise ValueError(f"{record.name!r} is not the name of a segment")
    n_rows = entry["n_rows"]
    if not all(isinstance(n, int) and n >= 0 for n in (n_rows, record.length, record.chunk, *record.crc32)):
        raise ValueError(f"{record.name} has a length or count that is not a whole number")
    if record.chunk == 0 or -(-record.length // record.chunk) != len(record.crc32):
        raise ValueError(f"{record.name} has {len(record.crc32)} checksums for {record.length} bytes")
    return Segment(record, n_rows)


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
    """A segment file: how many bytes it has, and its content in pieces.

    The widest types come first, so that every column starts at a multiple of its own item size.
    """
    ordered = sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, column in ordered:
        end = offset + column.nbytes
        kind = _DTYPE_NAMES[column.dtype.newbyteorder("<").str]
        header[name] = {"dtype": kind, "shape": list(column.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for _, column in ordered:
            yield np.ascontiguousarray(column).reshape(-1).view(np.uint8).data

    return 8 + len(text) + offset, pieces()


def open_segment(directory: Directory, segment: Segment) -> dict[str, ndarray]:
    """The columns of a segment, memory-mapped, after checking that its header can be trusted.

    Raises
    ------
    CorruptFile : if the file is missing, cut, or its header does not describe exactly what is there.
    """
    name, where = segment.file.name, directory.path / segment.file.name
    length = directory.length(name)
    if length != segment.file.length:
        found = "is missing" if length is None else f"has {length:,} bytes"
        raise CorruptFile(f"{where} {found}, expected {segment.file.length:,} bytes")
    header, start = _read_header(directory, segment.file)
    columns, covered = {}, []
    for column, entry in header.items():
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        size = dtype.itemsize
        for axis in shape:
            size *= axis
        if not shape or shape[0] != segment.n_rows or min(shape) < 0 or last - first != size:
            raise CorruptFile(f"{where}: column {column!r} of shape {shape} does not fit its {last - first} bytes")
        covered.append((first, last))
        columns[column] = directory.map(name, dtype, shape, start + first)
    ends = [0, *(last for _, last in sorted(covered))]
    if [first for first, _ in sorted(covered)] != ends[:-1] or start + ends[-1] != length:
        raise CorruptFile(f"{where}: its columns overlap or leave holes")
    return columns


def _read_header(directory: Directory, record: FileRecord) -> tuple[dict[str, Any], int]:
    where = directory.path / record.name
    with open(where, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(MAX_HEADER, record.length):
            raise CorruptFile(f"{where} announces a header of {length:,} bytes, expected at most {MAX_HEADER:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
        for entry in header.values():
            _DTYPES[entry["dtype"]], [int(n) for n in (*entry["shape"], *entry["data_offsets"])]
            first, last = entry["data_offsets"]
            if not 0 <= first <= last:
                raise ValueError("an offset is out of order")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{where} has a damaged header: {error!r}") from error
    return header, 8 + length
