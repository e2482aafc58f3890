"""Tables of Arrow: Parquet, and Arrow's own file (IPC, Feather)."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, MissingExtra
from residual_memory.exchange.description import described_in
from residual_memory.exchange.fields import Exported, Field
from residual_memory.exchange.rows import BLOCK_BYTES, COLUMNS, Block, Rows, block_of, held, moments, needed
from residual_memory.memory.attributes import EXPIRES, NEVER, TEXTS, Texts, tags_of

DESCRIPTION = b"residual_memory"  # the schema's key for what makes an identical memory again
WRITTEN = {
    **{name: name for name in COLUMNS},
    "labels": "label",
    "ids": "id",
    "groups": "group",
    "owners": "owner",
    "snippets": "snippet",
}
LAST_MOMENT = NEVER // 1000  # that Parquet can say: it counts in milliseconds
_TEXT = ("string", "large_string", "string_view")
_MOST_ROWS = 65_536  # of a block


class _Table(Rows):
    """A file with list columns `keys` and `predictions`, a column `label`, and perhaps others of `WRITTEN`."""

    kind: str

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        with self._file() as file:
            self.n_rows, schema = self._described(file)
            self._names = needed(self.name, schema.names, WRITTEN)
            self._check_types(schema)
            text = (schema.metadata or {}).get(DESCRIPTION)
        self.columns, self.top_m = held(self._names), "indices" in self._names
        self.manifest = None if text is None else described_in(text, self.name, self._names)

    @abstractmethod
    def _open(self, source: Any) -> Any:
        """The reader of the file; a context manager."""

    @abstractmethod
    def _described(self, file: Any) -> tuple[int, Any]:
        """Number of rows, and schema."""

    @abstractmethod
    def _batches(self, file: Any, first: int, size: int | None) -> Iterator[tuple[int, Any]]:
        """Record batches of the columns that are read, each with the number of its first row, from `first` on."""

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        with self._file() as file:
            for start, batch in self._batches(file, first, size):
                skipped = min(max(first - start, 0), batch.num_rows)
                batch = batch.slice(skipped)
                if batch.num_rows:
                    values = {name: self._values(batch.column(WRITTEN[name]), name) for name in self._names}
                    yield block_of(start + skipped, values)

    def _check_types(self, schema: Any) -> None:
        """Refuse what is no column of numbers or text before anything is read."""
        import pyarrow as pa

        for name in self._names:
            kind = schema.field(WRITTEN[name]).type
            plain = _values_of(kind)
            numeric = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_boolean(plain)
            text = str(plain) in _TEXT
            expected = "numbers"
            if name == EXPIRES:
                fits = numeric or (pa.types.is_timestamp(kind) and kind.tz is not None)
                expected = "a timestamp with a time zone, or seconds since 1970"
            elif name in TEXTS:
                fits = text and (name == "tags" or not _is_list(kind))
                expected = "lists of text" if name == "tags" else "text"
            else:
                fits = numeric or (text and name in ("ids", "groups"))
            if not (fits or pa.types.is_null(plain)):
                raise InvalidInput(f"column {WRITTEN[name]!r} of {self.name} is {kind}, expected {expected}")

    def _values(self, column: Any, name: str) -> Any:
        """A column's values as a block has them."""
        if name == "tags":
            if _is_list(column.type) and column.flatten().null_count:
                raise InvalidInput(f"column 'tags' of {self.name} has missing values among its texts; leave them out")
            return [_tags(some) for some in column.to_pylist()]
        if name in TEXTS:
            return [text or "" for text in column.to_pylist()]
        return self._moments(column) if name == EXPIRES else self._array(column, name)

    def _moments(self, column: Any) -> ndarray:
        import pyarrow as pa

        if pa.types.is_null(column.type):
            return np.full(len(column), NEVER)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("s", column.type.tz), safe=False).cast(pa.int64())
        there = column.is_valid().to_numpy(zero_copy_only=False)
        found = moments(column.fill_null(0).to_numpy(zero_copy_only=False), f"column {EXPIRES!r} of {self.name}")
        return np.where(there, found, NEVER)

    def _array(self, column: Any, name: str) -> ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        where = f"column {WRITTEN[name]!r} of {self.name}"
        if column.null_count:
            raise InvalidInput(f"{where} has missing values; leave such rows out")
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if str(column.type) in _TEXT:
            return np.asarray(column.to_pylist(), np.str_)
        if not _is_list(column.type):
            return column.to_numpy(zero_copy_only=False)
        limits = pc.min_max(pc.list_value_length(column))
        shortest, longest = limits["min"].as_py(), limits["max"].as_py()
        if shortest != longest:
            raise InvalidInput(f"{where} has lists of {shortest} to {longest} numbers, not of one length")
        flat = column.flatten()
        if flat.null_count:
            raise InvalidInput(f"{where} has missing values; leave such rows out")
        return flat.to_numpy(zero_copy_only=False).reshape(len(column), longest)

    @contextmanager
    def _file(self) -> Iterator[Any]:
        pa = _pyarrow(f"reading {self.kind}")
        try:
            with self._open(pa) as file:
                yield file
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptFile(f"{self.name} cannot be read as {self.kind}: {reason}; write it again") from error


class ParquetRows(_Table):
    """A Parquet file, of which one block at a time is held."""

    kind = "Parquet"

    def _open(self, source: Any) -> Any:
        import pyarrow.parquet as pq

        # Buffered: otherwise the whole row group, often a million rows, is held at once.
        return pq.ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)

    def _described(self, file: Any) -> tuple[int, Any]:
        meta = file.metadata
        n_rows = sum(meta.row_group(group).num_rows for group in range(meta.num_row_groups))
        if n_rows != meta.num_rows:
            raise CorruptFile(f"{self.name} has {n_rows:,} rows, but says {meta.num_rows:,}; write it again")
        return n_rows, file.schema_arrow

    def _batches(self, file: Any, first: int, size: int | None) -> Iterator[tuple[int, Any]]:
        groups, start = _row_groups_from(file, first)
        columns = [WRITTEN[name] for name in self._names]
        step = size or self._step(file)
        for batch in file.iter_batches(step, row_groups=groups, columns=columns, use_threads=False):
            yield start, batch
            start += batch.num_rows
        if start != self.n_rows:
            raise CorruptFile(f"{self.name} has {self.n_rows:,} rows, of which {start:,} are there; write it again")

    def _step(self, file: Any) -> int:
        meta = file.metadata
        total = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
        return max(1, min(_MOST_ROWS, BLOCK_BYTES * max(self.n_rows, 1) // max(total, 1)))


class ArrowRows(_Table):
    """A file of Arrow's own (IPC; Feather is the same): mapped, so that a large record batch is read as it is used."""

    kind = "Arrow"

    def _open(self, source: Any) -> Any:
        return _Mapped(source, self._path)

    def _described(self, file: Any) -> tuple[int, Any]:
        narrow = [place for place, field in enumerate(file.reader.schema) if not _is_list(field.type)]
        counted = file.only(narrow[:1])
        return sum(counted.get_batch(n).num_rows for n in range(counted.num_record_batches)), file.reader.schema

    def _batches(self, file: Any, first: int, size: int | None) -> Iterator[tuple[int, Any]]:
        schema = file.reader.schema
        reader = file.only([schema.get_field_index(WRITTEN[name]) for name in self._names])
        start = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            step = size or max(1, min(_MOST_ROWS, BLOCK_BYTES * batch.num_rows // max(batch.nbytes, 1)))
            for begin in range(max(first - start, 0), batch.num_rows, step):
                yield start + begin, batch.slice(begin, step)
            start += batch.num_rows


class _Mapped:
    """An Arrow file that is open."""

    def __init__(self, pa: Any, path: Path) -> None:
        self._pa, self._map = pa, pa.memory_map(str(path))
        try:
            self.reader = pa.ipc.open_file(self._map)
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> "_Mapped":
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()

    def only(self, places: list[int]) -> Any:
        """A reader of these columns; of all where none is named."""
        return self._pa.ipc.open_file(self._map, options=self._pa.ipc.IpcReadOptions(included_fields=sorted(places)))


def _pyarrow(doing: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(doing, "report") from error
    return pa


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _values_of(kind: Any) -> Any:
    """The type of the numbers in a list, or of the column's own."""
    import pyarrow as pa

    return kind.value_type if _is_list(kind) or pa.types.is_dictionary(kind) else kind


def _tags(value: Any) -> tuple[str, ...]:
    """Of one row: a list, one text, or nothing."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value or ())


def _row_groups_from(file: Any, first: int) -> tuple[list[int], int]:
    """The row groups that hold row `first` and later ones, and the first row of the first of them."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if start + n_rows > first:
            return list(range(group, file.metadata.num_row_groups)), start
        start += n_rows
    return [], start


# ---------------------------------------------------------------------- out


def write_parquet(file: IO[bytes], exported: Exported) -> None:
    """The rows of a memory, a row group a block, with checksums over the pages."""
    _pyarrow("writing Parquet")
    import pyarrow.parquet as pq

    schema = _schema(exported)
    with pq.ParquetWriter(file, schema, use_dictionary=False, write_page_checksum=True) as writer:
        for batch in _record_batches(exported, schema, LAST_MOMENT):
            writer.write_batch(batch)


def write_arrow(file: IO[bytes], exported: Exported) -> None:
    """The rows of a memory, a record batch a block."""
    pa = _pyarrow("writing Arrow")
    schema = _schema(exported)
    with pa.ipc.new_file(file, schema) as writer:
        for batch in _record_batches(exported, schema):
            writer.write_batch(batch)


def _schema(exported: Exported) -> Any:
    import pyarrow as pa

    columns = [pa.field(WRITTEN[field.name], _arrow_type(field), field.name == EXPIRES) for field in exported.fields]
    columns += [pa.field(WRITTEN[text.name], _text_type(text.name), nullable=False) for text in exported.texts]
    return pa.schema(columns, metadata={DESCRIPTION: exported.description})


def _text_type(name: str) -> Any:
    import pyarrow as pa

    return pa.list_(pa.field("item", pa.string(), nullable=False)) if name == "tags" else pa.string()


def _arrow_type(field: Field) -> Any:
    import pyarrow as pa

    if field.name == EXPIRES:
        return pa.timestamp("s", "UTC")
    if field.dtype.kind == "U":
        return pa.large_string()
    kind = pa.from_numpy_dtype(field.dtype)
    return pa.list_(pa.field("item", kind, nullable=False), field.shape[0]) if field.shape else kind


def _record_batches(exported: Exported, schema: Any, last: int = NEVER) -> Iterator[Any]:
    import pyarrow as pa

    for rows in exported.row_blocks():
        columns = [_column(field, field.take(rows), schema, last) for field in exported.fields]
        columns += [_text_column(text.name, text.take(rows)) for text in exported.texts]
        yield pa.record_batch(columns, schema=schema)


def _text_column(name: str, texts: Texts) -> Any:
    import pyarrow as pa

    decoded = texts.decoded()
    return pa.array([tags_of(text) for text in decoded] if name == "tags" else decoded, _text_type(name))


def _column(field: Field, values: ndarray, schema: Any, last: int) -> Any:
    import pyarrow as pa

    kind = schema.field(WRITTEN[field.name]).type
    if field.name == EXPIRES:
        never = values == NEVER
        if (late := values[~never] > last).any():
            moment = values[~never][late][0].item()
            raise InvalidInput(f"a row expires {moment} s after 1970, which Parquet cannot say; write .arrow or .npz")
        return pa.array(values, pa.int64(), mask=never).cast(kind)
    if not field.shape:
        return pa.array(values, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), type=kind)
