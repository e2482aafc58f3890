"""What the commands read: arrays on disk, block by block, or what a model says of a data set.

Either way it comes as `Rows`, whose blocks are small: a source larger than the RAM is no trouble.
"""

import difflib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from residual_memory.cli.images import ImageFolder
from residual_memory.cli.loading import FITTING, Examples, load_dataset, load_model, user_code
from residual_memory.cli.options import MODEL_BATCH, OUTPUTS, chosen, similar
from residual_memory.cli.text import text_at
from residual_memory.errors import CorruptFile, DataNotFound, InvalidInput, MissingExtra
from residual_memory.memory import Memory
from residual_memory.models.base import Source
from residual_memory.progress import progress_bar
from residual_memory.types import Task
from residual_memory.validation import as_count, as_ids, as_keys, as_labels, as_predictions
from residual_memory.windows import TextFile

BLOCK_BYTES = 4 << 20
COLUMNS = ("keys", "predictions", "labels", "ids", "groups")
_REQUIRED = ("keys", "predictions")
_IN_PARQUET = {"keys": "keys", "predictions": "predictions", "labels": "label", "ids": "id", "groups": "group"}
_EXPECTED = (
    ".npz or .parquet arrays, a folder with keys.npy and predictions.npy, a folder of images in class subfolders, "
    "MODULE:NAME of a data set, or text as .txt"
)


@dataclass(frozen=True)
class Block:
    """Some rows of a source, in its order.

    Attributes
    ----------
    first : row number of the first.
    keys, predictions : as the source has them; predictions of one axis are one output.
    labels, ids, groups : None where the source has none.
    """

    first: int
    keys: Shaped[ndarray, "b ..."]
    predictions: Shaped[ndarray, "b ..."]
    labels: Shaped[ndarray, "b ..."] | None = None
    ids: Shaped[ndarray, " b"] | None = None
    groups: Shaped[ndarray, " b"] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def row_ids(self) -> Shaped[ndarray, " b"]:
        """The ids, which are the row numbers where the source gives none."""
        return np.arange(self.first, self.first + len(self)) if self.ids is None else as_ids(self.ids, len(self))


class Rows(ABC):
    """Keys and predictions of examples, perhaps with labels, ids and groups, read block by block."""

    name: str
    n_rows: int
    columns: frozenset[str]

    @abstractmethod
    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        """The rows from `first` on, in blocks of at most `size`."""

    def require(self, column: str, why: str) -> None:
        """Refuse a source without this column."""
        if column not in self.columns:
            raise InvalidInput(
                f"{self.name} holds no {column}, which {why} needs; it has {', '.join(sorted(self.columns))}"
            )

    def checked(self, block: Block, task: Task, n_outputs: int | None, dim: int | None = None) -> Block:
        """The block with its numbers validated; an error names the rows of the source.

        Parameters
        ----------
        task, n_outputs, dim : of the memory that the rows are for.
        """
        try:
            keys = as_keys(block.keys, dim)
            said: Any = as_predictions(block.predictions, task, n_outputs)
            width = said.shape[1] if n_outputs is None else n_outputs
            labels = None if block.labels is None else as_labels(block.labels, task, width, len(keys))
            if len(said) != len(keys):
                raise InvalidInput(f"there are {len(said):,} predictions for {len(keys):,} keys")
            return Block(block.first, keys, said, labels, block.ids, block.groups)
        except InvalidInput as error:
            last = block.first + len(block) - 1
            raise type(error)(f"in rows {block.first:,} to {last:,} of {self.name}: {error}") from None


# ---------------------------------------------------------------------- arrays


class NpyColumn:
    """One array in .npy form, read in blocks of rows by plain reads: pages of a map would count as our memory.

    Parameters
    ----------
    name : of the file, for messages.
    open_file : gives the file from its start.
    """

    def __init__(self, name: str, open_file: Callable[[], Any]) -> None:
        self.name, self._open = name, open_file
        with self._file() as file:
            self.shape, self.dtype = _npy_header(file, name)
            self._start = file.tell()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=int)) * self.dtype.itemsize

    def blocks(self, size: int, first: int = 0) -> Iterator[ndarray]:
        """The rows from `first` on.

        Raises
        ------
        CorruptFile : if the file ends too early.
        """
        with self._file() as file:
            file.seek(self._start + first * self.row_bytes)
            for start in range(first, len(self), size):
                block = np.empty((min(size, len(self) - start), *self.shape[1:]), self.dtype)
                if block.nbytes:
                    self._fill(file, block.reshape(-1).view(np.uint8).data)
                yield block.astype(self.dtype.newbyteorder("="), copy=False)

    def read(self) -> ndarray:
        """The whole array."""
        return next(self.blocks(max(len(self), 1)), np.empty(self.shape, self.dtype))

    def _fill(self, file: Any, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CorruptFile(f"{self.name} ends too early: it announces the shape {self.shape}; save it again")
            done += count

    @contextmanager
    def _file(self) -> Iterator[Any]:
        try:
            with self._open() as file:
                yield file
        except (zipfile.BadZipFile, EOFError) as error:
            raise CorruptFile(f"{self.name} is damaged: {error}; save it again") from error


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise ValueError(f"its version is {version}")
        shape, fortran, dtype = read[version](file)
    except ValueError as error:
        raise CorruptFile(f"{name} is not an array in .npy form: {error}; save it with numpy.save") from None
    if dtype.hasobject:
        raise InvalidInput(
            f"{name} holds Python objects, which are not read since they can run code; save a plain array of numbers"
        )
    if fortran and len(shape) > 1:
        raise InvalidInput(
            f"{name} is stored column by column and cannot be read row by row; save numpy.ascontiguousarray(array)"
        )
    if not shape:
        raise InvalidInput(f"{name} holds one number, expected an array with a row an example")
    return shape, dtype


class NpyRows(Rows):
    """Columns in .npy form: a folder of files, or the members of an .npz."""

    def __init__(self, name: str, columns: dict[str, NpyColumn]) -> None:
        self.name, self._columns = name, columns
        _require_columns(name, columns, _REQUIRED)
        self.columns = frozenset(columns)
        self.n_rows = len(columns["keys"])
        for values in columns.values():
            if len(values) != self.n_rows:
                raise InvalidInput(
                    f"{values.name} has {len(values):,} rows, but there are {self.n_rows:,} keys in {name}"
                )

    @staticmethod
    def of_folder(folder: Path) -> "NpyRows":
        """The files keys.npy, predictions.npy, … of a folder."""
        found = {name: folder / f"{name}.npy" for name in COLUMNS}
        columns = {
            name: NpyColumn(str(path), partial(open, path, "rb")) for name, path in found.items() if path.exists()
        }
        return NpyRows(str(folder), columns)

    @staticmethod
    def of_npz(path: Path) -> "NpyRows":
        """The members of an .npz, compressed or not."""
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.removesuffix(".npy") for name in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise CorruptFile(f"{path} is not an .npz file: {error}; save it with numpy.savez") from None
        _require_columns(str(path), members, _REQUIRED)
        columns = {
            name: NpyColumn(f"{path}:{name}", partial(_open_member, path, f"{name}.npy"))
            for name in COLUMNS
            if name in members
        }
        return NpyRows(str(path), columns)

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        row_bytes = sum(column.row_bytes for column in self._columns.values())
        step = size or max(1, BLOCK_BYTES // max(row_bytes, 1))
        names = list(self._columns)
        streams = zip(*(self._columns[name].blocks(step, first) for name in names), strict=True)
        for number, values in enumerate(streams):
            yield Block(first + number * step, **dict(zip(names, values, strict=True)))


@contextmanager
def _open_member(path: Path, name: str) -> Iterator[Any]:
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        yield member


class ParquetRows(Rows):
    """A Parquet file with list columns `keys` and `predictions`, a column `label`, and perhaps `id` and `group`."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        with self._file() as file:
            self.n_rows = file.metadata.num_rows
            present = file.schema_arrow.names
        _require_columns(self.name, present, [_IN_PARQUET[name] for name in _REQUIRED])
        self.columns = frozenset(name for name in COLUMNS if _IN_PARQUET[name] in present)

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        names = [name for name in COLUMNS if name in self.columns]
        with self._file() as file:
            groups, start = _row_groups_from(file, first)
            batches = file.iter_batches(
                size or self._step(file),
                row_groups=groups,
                columns=[_IN_PARQUET[name] for name in names],
                use_threads=False,
            )
            for batch in batches:
                skipped = min(max(first - start, 0), batch.num_rows)
                batch, start = batch.slice(skipped), start + skipped
                if batch.num_rows:
                    values = {name: self._array(batch.column(_IN_PARQUET[name]), name) for name in names}
                    yield Block(start, **values)
                start += batch.num_rows

    def _step(self, file: Any) -> int:
        meta = file.metadata
        total = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
        return max(1, min(65_536, BLOCK_BYTES * max(self.n_rows, 1) // max(total, 1)))

    def _array(self, column: Any, name: str) -> ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        if column.null_count:
            raise InvalidInput(f"column {_IN_PARQUET[name]!r} of {self.name} has missing values; leave such rows out")
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return np.asarray(column.to_pylist(), np.str_)
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return column.to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(column)
        limits = pc.min_max(lengths)
        shortest, longest = limits["min"].as_py(), limits["max"].as_py()
        if shortest != longest:
            where = f"column {_IN_PARQUET[name]!r} of {self.name}"
            raise InvalidInput(f"{where} has lists of {shortest} to {longest} numbers, not of one length")
        flat = column.flatten()
        if flat.null_count:
            raise InvalidInput(f"column {_IN_PARQUET[name]!r} of {self.name} has missing values; leave such rows out")
        return flat.to_numpy(zero_copy_only=False).reshape(len(column), longest)

    @contextmanager
    def _file(self) -> Iterator[Any]:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra("reading Parquet", "report") from error
        try:
            # Buffered: otherwise the whole row group, often a million rows, is held at once.
            with pq.ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False) as file:
                yield file
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptFile(f"{self.name} cannot be read as Parquet: {reason}; write it again") from error


def _row_groups_from(file: Any, first: int) -> tuple[list[int], int]:
    """The row groups that hold row `first` and later ones, and the first row of the first of them."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        if start + n_rows > first:
            return list(range(group, file.metadata.num_row_groups)), start
        start += n_rows
    return [], start


def _require_columns(name: str, present: Any, required: Sequence[str]) -> None:
    for column in required:
        if column not in present:
            close = difflib.get_close_matches(column, list(present), 1, 0.5)
            hint = f"; is {close[0]!r} meant to be it?" if close else ""
            found = ", ".join(map(repr, sorted(present))) or "nothing"
            raise InvalidInput(f"{name} holds no {column!r}, it has {found}{hint}")


# ---------------------------------------------------------------------- a model and a data set


class ModelRows(Rows):
    """What a model says of the examples of a data set, in one pass.

    Parameters
    ----------
    name : of the data, for messages.
    watch : a `models.torch.Watch` on the layer that the memory was built from.
    dataset : items (x, y), or x alone where labels are not needed.
    labelled : whether the items have labels.
    batch_size : examples that the model sees at once; None takes 256.
    names : of the examples, as their ids; None numbers them.
    """

    def __init__(
        self,
        name: str,
        watch: Any,
        dataset: Examples,
        *,
        labelled: bool,
        batch_size: int | None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._names = names
        self.name, self._watch, self._dataset, self._labelled = name, watch, dataset, labelled
        self._batch_size = batch_of(batch_size)
        self.n_rows = len(dataset)
        self.columns = frozenset({"keys", "predictions", "labels"} if labelled else {"keys", "predictions"})

    def blocks(self, *, first: int = 0, size: int | None = None) -> Iterator[Block]:
        from torch.utils.data import DataLoader, Subset

        chosen_rows: Any = Subset(self._dataset, range(first, self.n_rows))  # type: ignore[arg-type]
        batches = iter(DataLoader(chosen_rows, size or self._batch_size))
        while True:
            with user_code(f"running the model on {self.name}", FITTING):
                batch = next(batches, None)
                if batch is None:
                    return
                block = self._observed(batch, first)
            yield block
            first += len(block)

    def _observed(self, batch: Any, first: int) -> Block:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        if self._labelled and not pair:
            raise InvalidInput(f"an item of {self.name} is a {type(batch).__name__}, expected a pair (x, y)")
        raw, keys = self._watch.run(batch[0] if pair else batch)
        said = self._watch.predictions(raw).cpu().numpy()
        labels = np.asarray(batch[1].cpu()) if self._labelled else None
        ids = None if self._names is None else np.array(self._names[first : first + len(keys)])
        return Block(first, keys.cpu().numpy(), said, labels, ids)


def batch_of(batch_size: int | None) -> int:
    """Examples that the model sees at once."""
    return MODEL_BATCH if batch_size is None else as_count("--batch-size", batch_size)


# ---------------------------------------------------------------------- from what the user types


@dataclass(frozen=True)
class Reading:
    """How to turn `--data` into rows.

    Attributes
    ----------
    model : MODULE:NAME, for data that are examples.
    outputs : what the model gives.
    batch_size : examples that the model sees at once; None takes 256.
    image_size : side that images are resized to.
    """

    model: str | None = None
    outputs: str = "logits"
    batch_size: int | None = None
    image_size: int | None = None


def open_rows(text: str, memory: Memory, reading: Reading, *, labelled: bool = True) -> Rows:
    """The rows that a user names, with keys and predictions as the memory's rows have them.

    Parameters
    ----------
    text : a path or MODULE:NAME.
    memory : whose layer a model is watched at.
    reading : the options.
    labelled : whether labels are needed.

    Raises
    ------
    DataNotFound, InvalidInput, CorruptFile : if there are no such data, or not of a kind that can be read.
    FingerprintMismatch : if the model is not the one that the memory was built with.
    """
    found = open_data(text, image_size=reading.image_size, class_names=memory.class_names, labelled=labelled)
    if isinstance(found, TextFile):
        raise InvalidInput(
            f"{text} is text, with which resmem builds, tunes and evaluates; "
            "for the rest use residual_memory.ResMemForCausalLM from Python"
        )
    if isinstance(found, Rows):
        if reading.model is not None:
            raise InvalidInput(f"{text} holds keys and predictions already; leave --model out")
        if labelled:
            found.require("labels", "this command")
        return found
    if reading.model is None:
        raise InvalidInput(f"{text} is a data set of examples; add --model MODULE:NAME, the model to run on it")
    watch = _watch(load_model(reading.model), memory, chosen("--outputs", reading.outputs, OUTPUTS))
    names = found.names if isinstance(found, ImageFolder) and not labelled else None
    return ModelRows(text, watch, found, labelled=labelled, batch_size=reading.batch_size, names=names)


def open_data(
    text: str, *, image_size: int | None = None, class_names: Sequence[str] | None = None, labelled: bool = True
) -> Rows | Examples | TextFile:
    """Arrays as `Rows`; images and MODULE:NAME as a data set of examples; text as its documents."""
    path = Path(text)
    if (documents := text_at(text)) is not None:
        return documents
    if path.is_dir():
        if any((path / f"{name}.npy").exists() for name in COLUMNS):
            return NpyRows.of_folder(path)
        return ImageFolder(path, size=image_size, class_names=class_names, labelled=labelled)
    if path.is_file():
        readers: dict[str, Callable[[Path], Rows]] = {".npz": NpyRows.of_npz, ".parquet": ParquetRows}
        if path.suffix.lower() not in readers:
            raise InvalidInput(f"{text} is a file of type {path.suffix or 'unknown'!r}, expected {_EXPECTED}")
        return readers[path.suffix.lower()](path)
    if ":" in text and "/" not in text:
        return load_dataset(text)
    raise DataNotFound(f"there are no data at {text}{similar(path) or f'; expected {_EXPECTED}'}")


def _watch(model: Any, memory: Memory, outputs: str) -> Any:
    if memory.source is None:
        raise InvalidInput(
            f"the memory at {memory.path} was filled from arrays and does not say which layer its keys come from; "
            "give --data as arrays too"
        )
    from residual_memory.models.torch import Watch

    built = Source.from_dict(memory.source)
    if ":" in built.layer:
        raise InvalidInput(f"the keys come from the function {built.layer!r}; use this memory from Python")
    watch = Watch(model, built.layer, built.side, pool=built.pool, outputs=outputs, task=memory.layout.task)  # type: ignore[arg-type]
    built.check(watch.source(built.data), f"at {memory.path}", data=False)
    return watch


@dataclass(frozen=True)
class Queries:
    """All rows of a source at once, for what needs them at once."""

    keys: Float[ndarray, "q d"]
    predictions: Float[ndarray, "q c"]
    labels: Shaped[ndarray, "q ..."]
    groups: Shaped[ndarray, " q"] | None


def read_all(rows: Rows, memory: Memory) -> Queries:
    """Read a labelled source to its end."""
    layout = memory.layout
    blocks = []
    with progress_bar("reading", rows.n_rows) as advance:
        for block in rows.blocks():
            blocks.append(rows.checked(block, layout.task, layout.n_outputs, layout.dim))
            advance(len(block))
    if not blocks:
        raise InvalidInput(f"{rows.name} holds no rows")
    groups = [block.groups for block in blocks if block.groups is not None]
    labels = [block.labels for block in blocks if block.labels is not None]
    return Queries(
        np.concatenate([block.keys for block in blocks]),
        np.concatenate([block.predictions for block in blocks]),
        np.concatenate(labels),
        np.concatenate(groups) if groups else None,
    )
