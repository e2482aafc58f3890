"""Search by the vector index of Lance, IVF_PQ: an index of residual-memory in a package of its own.

A spec reads "lance", or with its options "lance:num_partitions=64,num_sub_vectors=32?nprobes=16&k_factor=10".
"""

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.indexes.base import Candidates, Engine, Index, IndexSpec, Pieces, Stored, Usable, numbers_of
from residual_memory.indexes.distances import KeySource
from residual_memory.indexes.footprint import BuildTime, ExampleKeys, Footprint, extrapolated

ROWS_PER_PARTITION = 4096  # unless their number is named
LEAST_ROWS = 256  # that a partition, and a code of a byte, are learned from
K_FACTOR = 10.0  # codes rank coarsely: so many times k rows are listed, and scored again from the keys
ROWS_PER_BLOCK = 1 << 16
PROBE_ROWS = 8192
NAMES = "names"  # the piece that lists the others


class LanceEngine(Engine):
    """IVF_PQ of Lance. Keys lie in its files in float32, beside the memory's own."""

    def check(self, spec: IndexSpec, width: int) -> None:
        _build_options(spec.build, width, LEAST_ROWS)
        _query_options(spec.options)

    def required_rows(self, spec: IndexSpec) -> int:
        return LEAST_ROWS * max(_numbers(spec.build).get("num_partitions", 1), 1)

    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        options = _build_options(spec.build, width, n_rows)
        codes = n_rows * (options["num_sub_vectors"] + 8) + 4 * width * (options["num_partitions"] + 256)
        return Footprint(codes, codes + n_rows * (4 * width + 8), 2 * codes + n_rows * (4 * width + 8))

    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        def build(keys: ExampleKeys, n: int) -> Index:
            return self.build(spec, keys, 0, n)

        return extrapolated(build, width, n_rows, max(PROBE_ROWS, 2 * self.required_rows(spec)))

    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        folder = Path(tempfile.mkdtemp(prefix="lance-"))
        columns = pa.schema([("row", pa.int64()), ("key", pa.list_(pa.float32(), keys.width))])
        batches = pa.RecordBatchReader.from_batches(columns, _batches(keys, first, n_rows, columns))
        options: dict[str, Any] = _build_options(spec.build, keys.width, n_rows)
        try:
            dataset = lance.write_dataset(batches, folder)
            dataset.create_index("key", "IVF_PQ", metric="l2", **options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return LanceIndex(spec, folder, dataset, first)

    def saved_name(self, spec: IndexSpec) -> str:
        return f"lance {lance.__version__}:{spec.build}"

    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        folder = Path(tempfile.mkdtemp(prefix="lance-"))
        try:
            return LanceIndex(spec, folder, _unpacked(stored.pieces, folder, n_rows, keys.width), first)
        except (OSError, ValueError, KeyError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise CorruptFile(f"Lance cannot read a saved index: {error}") from error


class LanceIndex(Index):
    """A Lance dataset with its index, in a folder that goes when the index goes."""

    def __init__(self, spec: IndexSpec, folder: Path, dataset: lance.LanceDataset, first: int) -> None:
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.first, self.n_rows = first, dataset.count_rows()
        self._spec, self._folder, self._dataset = spec, folder, dataset
        options = _query_options(spec.options)
        partitions = _build_options(spec.build, 1, self.n_rows)["num_partitions"]
        self._nprobes = int(options.get("nprobes", max(1, partitions // 8)))
        self._k_factor = options.get("k_factor", K_FACTOR)

    def candidates(self, queries: ndarray, n_neighbors: int, usable: Usable | None = None) -> Candidates:
        k = min(int(n_neighbors * self._k_factor), self.n_rows)
        rows = np.full((len(queries), k), -1, np.int64)
        for line, query in zip(rows, queries.astype(np.float32), strict=True):
            nearest: dict[str, Any] = {"column": "key", "q": query, "k": k, "nprobes": self._nprobes}
            found = self._dataset.to_table(columns=["row", "_distance"], nearest=nearest)["row"].to_numpy()
            line[: len(found)] = found + self.first
        return Candidates(rows, None)

    @property
    def saved_as(self) -> str:
        return LanceEngine().saved_name(self._spec)

    def saved(self) -> Pieces:
        files = [file for file in sorted(self._folder.rglob("*")) if file.is_file()]
        pieces = {file.relative_to(self._folder).as_posix(): file.read_bytes() for file in files}
        return {**pieces, NAMES: json.dumps(list(pieces)).encode()}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return f"lance {self._spec.build}".rstrip()


def _batches(keys: KeySource, first: int, n_rows: int, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The keys, numbered from 0, block by block."""
    done = 0
    for block in keys.blocks(ROWS_PER_BLOCK, first):
        some = np.ascontiguousarray(block[: n_rows - done], np.float32)
        if len(some):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), keys.width)
            yield pa.record_batch([pa.array(np.arange(done, done + len(some))), vectors], schema=columns)
        done += len(some)


def _unpacked(pieces: Pieces, folder: Path, n_rows: int, width: int) -> lance.LanceDataset:
    """The dataset of a saved index, in a folder outside which nothing is written.

    Raises
    ------
    OSError, ValueError, KeyError : if it is not what was saved of so many keys of this width.
    """
    files = {name: piece for name, piece in pieces.items() if name != NAMES}
    if json.loads(bytes(pieces[NAMES])) != list(files):
        raise ValueError("it holds other files than it lists")
    for name, piece in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names a file {name!r}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(piece)
    dataset = lance.dataset(folder)
    found = dataset.count_rows(), dataset.schema.field("key").type.list_size
    if found != (n_rows, width):
        raise ValueError(f"it is of {found[0]:,} rows of {found[1]} numbers, expected {n_rows:,} of {width}")
    return dataset


def _numbers(build: str) -> dict[str, int]:
    """What stands behind the colon, as whole numbers."""
    options = {}
    for text in build.split(",") if build else ():
        name, _, value = text.partition("=")
        if name not in ("num_partitions", "num_sub_vectors") or not value.isdecimal() or int(value) < 1:
            raise InvalidInput(
                f"index 'lance' is not built with {text!r}, expected num_partitions or num_sub_vectors=N"
            )
        options[name] = int(value)
    return options


def _build_options(build: str, width: int, n_rows: int) -> dict[str, int]:
    """The options of the structure, with what so many rows of this width get unless it is named."""
    vectors = next(m for m in range(max(width // 2, 1), 0, -1) if width % m == 0)
    options = {"num_partitions": max(1, n_rows // ROWS_PER_PARTITION), "num_sub_vectors": vectors, **_numbers(build)}
    if width > 1 and width % options["num_sub_vectors"]:
        raise InvalidInput(f"num_sub_vectors is {options['num_sub_vectors']}, expected a divisor of {width}")
    return options


def _query_options(options: Mapping[str, str]) -> dict[str, float]:
    """The options of the search."""
    numbers = numbers_of(options)
    for name, value in numbers.items():
        if name not in ("nprobes", "k_factor"):
            raise InvalidInput(f"index 'lance' has no query option {name!r}, expected nprobes or k_factor")
        if not 1 <= value < float("inf"):
            raise InvalidInput(f"index option {name} is {value:g}, expected a number of at least 1")
    return numbers
