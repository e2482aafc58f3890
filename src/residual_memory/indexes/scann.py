"""Approximate search by ScaNN, the paper's engine: a tree of leaves and quantised codes, re-scored from the memory."""

import importlib.metadata
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.indexes.base import (
    Candidates,
    Engine,
    Index,
    IndexSpec,
    Pieces,
    Stored,
    Usable,
    numbers_of,
    require,
)
from residual_memory.indexes.distances import KeySource
from residual_memory.indexes.footprint import BuildTime, ExampleKeys, Footprint, extrapolated

ROWS_PER_LEAF, LEAST_ROWS = 16, 256
# Codes of half a byte for every two numbers rank coarsely: 2, 4 and 10 times k recalled 0.55, 0.81 and 1.00 of 100,000
# clustered keys of 64 numbers. Anisotropic codes, made for inner products, recalled no more at Euclidean distance.
K_FACTOR = 10.0
LEAST_LEAVES_TO_SEARCH = 32
QUERIES_PER_BATCH = 256
PROBE_ROWS = 16_384  # that are indexed to tell how long more will take
LARGEST_SQUARE = 1e36  # the squared length of a vector that ScaNN is given: the process ends where its sums overflow

BUILD_OPTIONS = {
    "num_leaves": 1.0,
    "dimensions_per_block": 1.0,
    "training_sample_size": 16.0,
    "anisotropic_quantization_threshold": 0.0,
}
QUERY_OPTIONS = ("num_leaves_to_search", "k_factor")

_CENTRE = "centre"
_FILE = re.compile(r"\w+\.(pb|pbtxt|npy)")


class ScannEngine(Engine):
    """ScaNN: options of the structure behind the colon, those of the search behind the question mark."""

    def check(self, spec: IndexSpec, width: int) -> None:
        require("scann", "scann")
        build_settings(spec.build, 1)
        check_query_options(numbers_of(spec.options))

    def required_rows(self, spec: IndexSpec) -> int:
        return max(LEAST_ROWS, ROWS_PER_LEAF * int(_options(spec.build).get("num_leaves", 1)))

    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        settings = build_settings(spec.build, n_rows)
        codes = -(-width // int(settings["dimensions_per_block"]))
        ram = n_rows * (codes + 4) + 4 * int(settings["num_leaves"]) * width
        return Footprint(ram, ram, 4 * n_rows * width + ram)  # all keys are in RAM while it is built

    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        some = max(min(n_rows, PROBE_ROWS), 2 * self.required_rows(spec))
        power = 1.0 if "num_leaves" in _options(spec.build) else 1.5  # of as many leaves as the root of the rows

        def build(keys: ExampleKeys, n: int) -> Index:
            return self.build(spec, keys, 0, n)

        return extrapolated(build, width, n_rows, some, power)

    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        return Scann(keys, first, n_rows, build=spec.build, options=numbers_of(spec.options))

    def saved_name(self, spec: IndexSpec) -> str:
        return _saved_name(spec.build)

    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        return Scann(keys, first, n_rows, build=spec.build, options=numbers_of(spec.options), stored=stored.pieces)


def _saved_name(build: str) -> str:
    return f"scann {importlib.metadata.version('scann')}:{build}"


class Scann(Index):
    """A ScaNN searcher: partitioned, scored by asymmetric hashing, and re-scored by `nearest`.

    Building needs all keys in RAM in float32; afterwards only the codes stay.

    Parameters
    ----------
    build : options of the structure, `BUILD_OPTIONS`, as they stand behind the colon of the spec.
    options : `QUERY_OPTIONS` of the search.
    stored : what `saved` gave; None builds.

    Raises
    ------
    InvalidInput : if keys hold what ScaNN cannot take.
    CorruptFile : if `stored` is not of such an index.

    References
    ----------
    Guo et al., "Accelerating large-scale inference with anisotropic vector quantization", ICML 2020.
    """

    def __init__(
        self,
        keys: KeySource,
        first: int,
        n_rows: int,
        *,
        build: str,
        options: Mapping[str, float],
        stored: Pieces | None = None,
    ) -> None:
        self.first, self.n_rows, self._build = first, n_rows, build
        settings = build_settings(build, n_rows)
        check_query_options(options)
        leaves = int(settings["num_leaves"])
        self._leaves = int(options.get("num_leaves_to_search", max(LEAST_LEAVES_TO_SEARCH, leaves // 16)))
        self._k_factor = options.get("k_factor", K_FACTOR)
        if stored is None:
            self._centre, self._searcher = _built(keys, first, n_rows, settings)
        else:
            self._centre, self._searcher = _loaded(stored, keys.width, n_rows)

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        if queries.shape[1] != len(self._centre):
            raise InvalidInput(f"queries have dimension {queries.shape[1]}, but the index is of {len(self._centre)}")
        k = min(int(n_neighbors * self._k_factor), self.n_rows)
        if not len(queries):
            return Candidates(np.zeros((0, k), np.int64), None)
        centred = _centred(queries, self._centre, "queries")
        many = len(queries) > QUERIES_PER_BATCH
        search = self._searcher.search_batched_parallel if many else self._searcher.search_batched
        rows, distances = search(centred, final_num_neighbors=k, leaves_to_search=self._leaves)
        return Candidates(np.where(np.isnan(distances), -1, rows.astype(np.int64) + self.first), None)

    @property
    def saved_as(self) -> str:
        return _saved_name(self._build)

    def saved(self) -> Pieces:
        with tempfile.TemporaryDirectory() as folder:
            self._searcher.serialize(folder, relative_path=True)
            pieces = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
        return {**pieces, _CENTRE: self._centre.tobytes()}

    def measured(self) -> None:
        return None

    @property
    def description(self) -> str:
        return f"scann {self._build}".rstrip()


def build_settings(build: str, n_rows: int) -> dict[str, float]:
    """The options of a build string, with the number of leaves that so many rows get unless it is named: sqrt(n).

    Raises
    ------
    InvalidInput : if an option is unknown or of no use.
    """
    return {"num_leaves": float(max(1, round(n_rows**0.5))), "dimensions_per_block": 2.0, **_options(build)}


def check_query_options(options: Mapping[str, float]) -> None:
    """Refuse what is no option of a query.

    Raises
    ------
    InvalidInput : naming the option and where it belongs.
    """
    for name, value in options.items():
        if name in BUILD_OPTIONS:
            raise InvalidInput(f"index option {name!r} is for building: write 'scann:{name}={value:g}'")
        if name not in QUERY_OPTIONS:
            raise InvalidInput(f"index 'scann' has no query option {name!r}, expected {' or '.join(QUERY_OPTIONS)}")
        if not 1 <= value < float("inf"):
            raise InvalidInput(f"index option {name} is {value:g}, expected a number of at least 1")


def _options(build: str) -> dict[str, float]:
    options = {}
    for text in build.split(",") if build else ():
        name, _, given = text.partition("=")
        if name not in BUILD_OPTIONS:
            hint = ": write it behind a question mark" if name in QUERY_OPTIONS else ""
            raise InvalidInput(
                f"index 'scann' is not built with {text!r}, expected name=value of {', '.join(BUILD_OPTIONS)}{hint}"
            )
        try:
            options[name] = float(given)
        except ValueError:
            raise InvalidInput(f"index option {text!r} is not a number") from None
        least = BUILD_OPTIONS[name]
        if not least <= options[name] < float("inf"):
            raise InvalidInput(f"index option {text!r} is not a number of at least {least:g}")
    return options


def _built(keys: KeySource, first: int, n_rows: int, settings: Mapping[str, float]) -> tuple[ndarray, Any]:
    from scann.scann_ops.py import scann_ops_pybind

    gathered = np.empty((n_rows, keys.width), np.float32)
    filled = 0
    for block in keys.blocks(1 << 16, first):
        taken = block[: n_rows - filled]
        gathered[filled : filled + len(taken)] = taken
        filled += len(taken)
    centre = gathered.mean(axis=0, dtype=np.float64)
    sample = int(settings.get("training_sample_size", 100_000))
    leaves = int(settings["num_leaves"])
    threshold = settings.get("anisotropic_quantization_threshold", float("nan"))
    searcher = (
        scann_ops_pybind.builder(_centred(gathered, centre, "keys", out=gathered), 1, "squared_l2")
        .tree(num_leaves=leaves, num_leaves_to_search=leaves, training_sample_size=sample)
        .score_ah(int(settings["dimensions_per_block"]), threshold, training_sample_size=sample)
        .build()
    )
    return centre, searcher


def _loaded(stored: Pieces, width: int, n_rows: int) -> tuple[ndarray, Any]:
    from scann.scann_ops.py import scann_ops_pybind

    files = {name: piece for name, piece in stored.items() if name != _CENTRE}
    centre = np.frombuffer(stored.get(_CENTRE, b""), np.float64)
    if len(centre) != width or not all(_FILE.fullmatch(name) for name in files):
        raise CorruptFile("a saved ScaNN index holds other parts than it should")
    with tempfile.TemporaryDirectory() as folder:
        for name, piece in files.items():
            (Path(folder) / name).write_bytes(piece)
        try:
            searcher = scann_ops_pybind.load_searcher(folder, assets_backcompat_shim=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise CorruptFile(f"ScaNN cannot read a saved index: {error}") from error
    if searcher.size() != n_rows:
        raise CorruptFile(f"a saved ScaNN index holds {searcher.size():,} rows, expected {n_rows:,}")
    return centre, searcher


def _centred(
    vectors: Float[ndarray, "b d"], centre: Float[ndarray, " d"], name: str, out: ndarray | None = None
) -> Float[ndarray, "b d"]:
    """Vectors around the centre in float32; what would end ScaNN's process is refused."""
    centred = np.empty(vectors.shape, np.float32) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(vectors, centre, out=centred, casting="same_kind")
        largest = np.einsum("bd,bd->b", centred, centred).max()
    if not largest <= LARGEST_SQUARE:
        raise InvalidInput(f"{name} are not finite, or too long for ScaNN, which sums squares in float32; use 'exact'")
    return centred
