"""Approximate search by faiss: inverted files and product quantisation, re-scored from the memory's own keys."""

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput, LowRecall
from residual_memory.indexes.base import (
    Candidates,
    Engine,
    Index,
    IndexSpec,
    Measured,
    Pieces,
    Stored,
    Usable,
    listed_for,
    numbers_of,
    require,
)
from residual_memory.indexes.calibration import FACTORS, Calibration, Lister, as_recall, calibrated
from residual_memory.indexes.distances import KeySource
from residual_memory.indexes.footprint import BuildTime, Footprint

TRAINING_ROWS_PER_CELL, TRAINING_BYTES = 64, 1 << 30
TWO_LEVELS_FROM = 1024  # cells; from here on they are learned in two levels, which takes sqrt(cells) times less
TOP_ROUNDS, ROUNDS, SEED = 10, 10, 1234
ADDED_PER_BLOCK = 1 << 16
# Quantised codes rank coarsely: measured recall at 2, 4 and 10 times k was 0.775, 0.92 and 0.99.
QUANTISED_FACTOR, UNQUANTISED_FACTOR = 10.0, 1.0
RECALL, K_FACTOR = "recall", "k_factor"
DESCRIBED_K = 50  # neighbours, the default of a regressor, for which the description tells the recall
_INDEX = "index"


class Way(NamedTuple):
    """How an index is asked: what a query looks at, and how many times as long as wanted the shortlist is."""

    effort: float
    k_factor: float


class FaissEngine(Engine):
    """Faiss: its factory string behind the colon; its query options, `k_factor` and `recall` behind the mark."""

    def check(self, spec: IndexSpec, width: int) -> None:
        require("faiss", "faiss")
        if not spec.build:
            raise InvalidInput("index 'faiss' needs a factory string, for example 'faiss:IVF1024,PQ64x4fs'")
        set_options(empty_index(width, spec.build), spec.build, numbers_of(spec.options))

    def required_rows(self, spec: IndexSpec) -> int:
        return max(39 * _cells(spec.build), 256 if "PQ" in spec.build else 1)

    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        from residual_memory.indexes.faiss_planning import footprint

        return footprint(spec.build, width, n_rows)

    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        from residual_memory.indexes.faiss_planning import build_time

        return build_time(spec.build, width, n_rows)

    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        options = numbers_of(spec.options)
        if isinstance(like, Faiss):
            index = _filled(like.emptied(), keys, first, n_rows)
            return Faiss(keys, first, n_rows, factory=like.factory, options=options, index=index, known=like.known)
        index = _trained(empty_index(keys.width, spec.build), keys, first, n_rows, spec.build)
        index = _filled(index, keys, first, n_rows)
        return Faiss(keys, first, n_rows, factory=spec.build, options=options, index=index)

    def saved_name(self, spec: IndexSpec) -> str:
        return _saved_name(spec.build)

    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        index = _loaded(stored.pieces, type(empty_index(keys.width, spec.build)), keys.width, n_rows)
        known = None if stored.measured is None else Calibration.read(stored.measured)
        return Faiss(
            keys, first, n_rows, factory=spec.build, options=numbers_of(spec.options), index=index, known=known
        )


class Faiss(Index):
    """Any index of faiss's factory.

    Parameters
    ----------
    factory : faiss's own spec, for example "IVF1024,PQ64x4fs". A trailing ",RFlat" is accepted and dropped: every
        shortlist is re-scored from the stored keys anyway, which costs no second copy of them.
    options : `nprobe`, `efSearch`, … as faiss names them; `k_factor`, how many times k the shortlist is long; and
        `recall`, for which the others are chosen by measuring, where they are not named.
    index : faiss's, trained and filled.
    known : what was measured of such an index before.

    References
    ----------
    Douze et al., "The Faiss library", 2024.
    """

    def __init__(
        self,
        keys: KeySource,
        first: int,
        n_rows: int,
        *,
        factory: str,
        options: Mapping[str, float],
        index: Any,
        known: Calibration | None = None,
    ) -> None:
        self.first, self.n_rows, self.factory = first, n_rows, factory.removesuffix(",RFlat")
        self._keys, self._index, self.known = keys, index, known
        effort, k_factor = usual_search(self.factory)
        name = effort_name(self.factory)
        self._recall = options.get(RECALL)
        self._ways: dict[int, Way] = {}  # found so far, by how many rows are asked for
        named = {"effort": name, K_FACTOR: K_FACTOR}
        self._named = {field: options[option] for field, option in named.items() if option in options}
        self._usual = Way(options.get(name, effort), options.get(K_FACTOR, k_factor))
        set_options(index, self.factory, {**options, name: self._usual.effort} if name else options)
        if self._recall is not None:
            if self.known is not None and not self.known.covers(self._named):
                self.known = None  # it was measured for other options
            self._calibration()
            self._warn_of_low_recall(self._recall)

    def candidates(self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: Usable | None = None) -> Candidates:
        way = self._way(n_neighbors)
        k = min(int(n_neighbors * way.k_factor), self.n_rows)
        packed = None if usable is None else usable.packed(self)
        as_set = packed is None and way.effort == self._usual.effort
        params = None if as_set else _search_params(self._index, way.effort, packed)
        _, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k, params=params)
        return Candidates(np.where(rows >= 0, rows + self.first, -1), None)

    def emptied(self) -> Any:
        """What was learned, in a faiss index without rows."""
        import faiss

        index: Any = faiss.clone_index(self._index)
        index.reset()
        return index

    @property
    def saved_as(self) -> str:
        return _saved_name(self.factory)

    def saved(self) -> Pieces:
        import faiss

        return {_INDEX: faiss.serialize_index(self._index).data}

    def measured(self) -> Measured:
        return asdict(self._calibration())

    @property
    def description(self) -> str:
        if self.known is None:
            return f"faiss {self.factory}"
        listed = listed_for(DESCRIBED_K)
        way = self._way(listed)
        searched = f"{effort_name(self.factory)} {way.effort:g}, " if way.effort else ""
        recall = self.known.recall(way.effort, way.k_factor, listed)
        found = "" if recall is None else f": recall {recall:.3f} at {DESCRIBED_K}"
        return f"faiss {self.factory} ({searched}k_factor {way.k_factor:g}{found})"

    def _way(self, listed: int) -> Way:
        """How so many rows are asked for."""
        if self._recall is None or self.known is None:
            return self._usual
        if listed not in self._ways:
            point = self.known.cheapest(self._recall, listed, self._named)
            self._ways[listed] = Way(point.effort, point.k_factor)
        return self._ways[listed]

    def _calibration(self) -> Calibration:
        """What is known of the index, measured if nothing is."""
        if self.known is None:
            efforts = sorted({*efforts_of(self.factory), self._usual.effort})
            factors = sorted({*FACTORS, self._usual.k_factor})
            taught = _training_rows(self._keys.width, self.first, self.n_rows, self.factory)
            self.known = calibrated(
                self._keys,
                self.first,
                self.n_rows,
                self._listing,
                efforts,
                factors,
                usual=self._usual.effort,
                without=taught,
            )
        return self.known

    def _warn_of_low_recall(self, wanted: float) -> None:
        listed = listed_for(DESCRIBED_K)
        found = self._calibration().recall(*self._way(listed), listed)
        if found is not None and found < wanted:
            warnings.warn(
                f"index {self.factory!r} finds {found:.3f} of the neighbours at most, {wanted:g} were asked for; its "
                "codes are too coarse: name one with longer ones",
                LowRecall,
                stacklevel=2,
            )

    def _listing(self, effort: float) -> Lister:
        """The search at one effort."""
        params = _search_params(self._index, effort)

        def search(queries: Float[ndarray, "q d"], length: int) -> Int64[ndarray, "q s"]:
            rows = self._index.search(queries, length, params=params)[1]
            return np.where(rows >= 0, rows + self.first, -1)

        return search


def _saved_name(factory: str) -> str:
    import faiss

    return f"faiss {faiss.__version__}:{factory.removesuffix(',RFlat')}"


def _cells(factory: str) -> int:
    for part in factory.split(","):
        if part.startswith("IVF"):
            return int("".join(c for c in part[3:].split("_")[0] if c.isdigit()) or 0)
    return 0


def effort_name(factory: str) -> str:
    """Faiss's name of what a query looks at; empty for an index that always looks at everything."""
    return "nprobe" if _cells(factory) else "efSearch" if "HNSW" in factory else ""


def usual_search(factory: str) -> tuple[float, float]:
    """Effort and k_factor where neither they nor a recall are named: a 32nd of the cells, as faiss's graphs do."""
    cells = _cells(factory)
    effort = max(1, cells // 32) if cells else 16 if "HNSW" in factory else 0
    return float(effort), QUANTISED_FACTOR if "PQ" in factory or "SQ" in factory else UNQUANTISED_FACTOR


def efforts_of(factory: str) -> list[float]:
    """What may be tried: doubled from 1 cell to all, from 16 vertices to 1,024."""
    if cells := _cells(factory):
        return [*(2.0**power for power in range((cells - 1).bit_length())), float(cells)]
    return [2.0**power for power in range(4, 11)] if "HNSW" in factory else [0.0]


def empty_index(dim: int, factory: str) -> Any:
    """An untrained faiss index.

    Raises
    ------
    InvalidInput : if faiss does not know the factory string.
    """
    import faiss

    try:
        return faiss.index_factory(dim, factory.removesuffix(",RFlat"), faiss.METRIC_L2)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].split(": ", 1)[-1]
        raise InvalidInput(f"faiss cannot make {factory!r} for keys of dimension {dim}: {reason}") from None


def set_options(index: Any, factory: str, options: Mapping[str, float]) -> None:
    """How an index is queried.

    Raises
    ------
    InvalidInput : if an option is unknown, or no number that it can have.
    """
    import faiss

    for name, value in options.items():
        if name == RECALL:
            as_recall(value)
            continue
        if not 1 <= value < float("inf"):
            raise InvalidInput(f"index option {name} is {value:g}, expected a number of at least 1")
        if name == K_FACTOR:
            continue
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            raise InvalidInput(
                f"index {factory!r} has no query option {name!r}; recall, k_factor and faiss's own are known"
            ) from None


def _search_params(index: Any, effort: float, packed: UInt8[ndarray, " bytes"] | None = None) -> Any:
    """What one search of a faiss index is told: its effort, and the rows that count where there are others.

    None for an index that always looks at everything.
    """
    faiss: Any = importlib.import_module("faiss")  # its stubs do not know the keywords of these classes

    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        params = _search_params(inner.index, effort, packed)
        return None if params is None else faiss.SearchParametersPreTransform(index_params=params)
    only = {} if packed is None else {"sel": faiss.IDSelectorBitmap(packed)}
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=int(effort), **only)
    return faiss.SearchParametersHNSW(efSearch=int(effort), **only) if isinstance(inner, faiss.IndexHNSW) else None


def _bare(index: Any) -> Any:
    """A faiss index without the transforms before it."""
    import faiss

    inner: Any = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def _trained(index: Any, keys: KeySource, first: int, n_rows: int, factory: str) -> Any:
    """Learn cells and codes from a sample."""
    import faiss

    if index.is_trained:
        return index
    sample = np.ascontiguousarray(keys.take(_training_rows(keys.width, first, n_rows, factory)), np.float32)
    inner = _bare(index)
    if isinstance(inner, faiss.IndexIVF) and inner.nlist >= TWO_LEVELS_FROM and len(sample) >= inner.nlist:
        if isinstance(index, faiss.IndexPreTransform):
            sample = _transformed(index, sample)
        centroids = two_level_centroids(sample, inner.nlist)
        inner.quantizer.train(centroids)
        inner.quantizer.add(centroids)
        inner.train(sample)
        index.is_trained = True
    else:
        index.train(sample)
    return index


def _transformed(index: Any, sample: Float32[ndarray, "s d"]) -> Float32[ndarray, "s e"]:
    """Train the transforms before an index, and what they make of the sample."""
    import faiss

    chain = index.chain
    for place in range(chain.size()):
        transform = faiss.downcast_VectorTransform(chain.at(place))
        if not transform.is_trained:
            transform.train(sample)
        sample = transform.apply(sample)
    return sample


def two_level_centroids(sample: Float32[ndarray, "s d"], cells: int) -> Float32[ndarray, "cells d"]:
    """Centroids by k-means within the clusters of a first k-means: sqrt(cells) / 2 times less work than at one level.

    Parameters
    ----------
    sample : at least as many vectors as cells.
    """
    import faiss

    few = int(cells**0.5)
    coarse = faiss.Kmeans(sample.shape[1], few, niter=TOP_ROUNDS, seed=SEED)
    coarse.train(sample)
    owners = coarse.assign(sample)[1]
    sizes = np.bincount(owners, minlength=few)
    ends = np.cumsum(sizes)
    shares = np.diff(ends * cells // ends[-1], prepend=0)  # at most a cluster's size, since there are fewer cells
    order = np.argsort(owners, kind="stable")
    centroids: list[ndarray] = []
    for end, size, share in zip(ends, sizes, shares, strict=True):
        members = np.ascontiguousarray(sample[order[end - size : end]])
        if share:
            fine = faiss.Kmeans(sample.shape[1], int(share), niter=ROUNDS, seed=SEED, min_points_per_centroid=1)
            fine.train(members)
            centroids.append(np.asarray(fine.centroids))
    return np.concatenate(centroids)


def _filled(index: Any, keys: KeySource, first: int, n_rows: int) -> Any:
    left = n_rows
    for block in keys.blocks(ADDED_PER_BLOCK, first):
        if left > 0:
            index.add(np.ascontiguousarray(block[:left], np.float32))
        left -= len(block)
    return index


def _loaded(stored: Pieces, kind: type, width: int, n_rows: int) -> Any:
    """The index that was saved, if it is of the kind that the factory makes and holds as much as it should."""
    import faiss

    try:
        index = faiss.deserialize_index(np.frombuffer(stored[_INDEX], np.uint8))
    except (KeyError, RuntimeError, MemoryError) as error:
        raise CorruptFile(f"faiss cannot read a saved index: {error}") from error
    if type(index) is not kind or (index.d, index.ntotal, index.is_trained) != (width, n_rows, True):
        raise CorruptFile(f"a saved faiss index is {type(index).__name__} of {index.ntotal:,} x {index.d} numbers")
    return index


def _training_rows(width: int, first: int, n_rows: int, factory: str) -> Int64[ndarray, " s"]:
    """Rows that cells and codes are learned from, evenly over all."""
    size = training_size(width, n_rows, factory)
    return first + np.unique(np.linspace(0, n_rows - 1, size).astype(np.int64))


def training_size(width: int, n_rows: int, factory: str) -> int:
    """Of how many rows cells and codes are learned."""
    wanted = TRAINING_ROWS_PER_CELL * max(_cells(factory), 256)
    return min(wanted, max(TRAINING_BYTES // (4 * width), 256), n_rows)
