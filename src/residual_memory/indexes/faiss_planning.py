"""What an index of faiss's factory will take: its bytes by arithmetic, its seconds by parts of it that are timed."""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.indexes.calibration import FACTORS, LISTED, NEIGHBORS, QUERIES
from residual_memory.indexes.distances import pair_distances
from residual_memory.indexes.faiss import (
    ROUNDS,
    TOP_ROUNDS,
    TWO_LEVELS_FROM,
    efforts_of,
    empty_index,
    training_size,
)
from residual_memory.indexes.footprint import BuildTime, ExampleKeys, Footprint, example_keys, seconds_per_row, timed

GROWTH = 1.5  # lists that grow hold some room: measured 1.3 to 1.55 of what they are when they are loaded
SAMPLE_BYTES = 6  # of a number of the training sample: as it was stored in half precision, and in single
MEASURING_BYTES = 64 << 20  # shortlists of the queries by which the recall is measured, and what is computed of them
BLOCK_ROWS = 32  # fast-scan codes lie in blocks of so many rows; the last of a list is half full on average
PROBE_CENTROID_BYTES = 32 << 20
PROBE_GRAPH_CENTROIDS = 4096  # a graph takes long to build
PROBE_ROWS = 16_384
PROBE_ROW_BYTES = 64 << 20
QUERIES_TIMED = 50
PROBE_SECONDS = 0.4  # of each thing that is timed
POINTS_PER_CENTROID = 256  # that faiss's k-means looks at, at most
OPQ_ROWS = 10_240  # 40 for each of the 256 centroids of a code


@dataclass(frozen=True)
class _Parts:
    """An empty index taken apart: rotations, then inverted lists or whatever keeps the codes."""

    whole: Any
    transforms: tuple[Any, ...]
    inner: Any

    @property
    def lists(self) -> Any | None:
        """The inner index, where it has inverted lists."""
        import faiss

        return self.inner if isinstance(self.inner, faiss.IndexIVF) else None


def footprint(factory: str, dim: int, n_rows: int) -> Footprint:
    """Bytes of an index of so many rows.

    Raises
    ------
    InvalidInput : if faiss does not know the factory, or what it makes is of a kind whose bytes are not known.
    """
    parts = _taken_apart(dim, factory)
    fixed = sum(4 * transform.d_in * transform.d_out for transform in parts.transforms)
    lists = parts.lists
    if lists is None:
        rows, tables = n_rows * _row_bytes(parts.inner, factory), 0
    else:
        rows, tables = _list_bytes(lists, n_rows), _table_bytes(lists)
        fixed += int(lists.nlist) * int(_row_bytes(_of_kind(lists.quantizer), factory))
    fixed += _code_book_bytes(parts.inner)
    saved = int(rows) + fixed
    sample = training_size(dim, n_rows, factory) if not parts.whole.is_trained else 0
    training = sample * dim * (SAMPLE_BYTES + (4 if parts.transforms else 0)) + fixed + tables
    saving = int(GROWTH * rows) + fixed + tables + 2 * saved  # faiss gives a copy of what it wrote
    return Footprint(saved + tables, saved, max(training, saving) + MEASURING_BYTES)


def build_time(factory: str, dim: int, n_rows: int) -> BuildTime:
    """Seconds of training and filling, from parts that are timed on made-up keys for about 3 seconds.

    Of inverted lists the assignment of rows to cells is timed at this number of cells, or at fewer and scaled: as the
    number of cells, or as its logarithm where a graph finds them. k-means is so many comparisons of the training
    sample with centroids. Rotations and codes are learned with fewer iterations from fewer rows, and scaled. Filling
    grows as the rows; where the rows themselves are a graph, as n log n. Measuring the recall compares its queries with
    all rows.

    Raises
    ------
    InvalidInput : if faiss does not know the factory.
    """
    sample = training_size(dim, n_rows, factory)
    examples = ExampleKeys(example_keys(max(1, min(PROBE_ROWS, n_rows, PROBE_ROW_BYTES // (4 * dim))), dim))
    keys = examples.whole
    wide = _taken_apart(dim, factory)  # kept: faiss's parts live as long as their whole
    lists = wide.lists
    cells = 0 if lists is None else int(lists.nlist)
    some = min(cells, max(PROBE_CENTROID_BYTES // (4 * dim), 256))
    if lists is not None and _is_graph(_of_kind(lists.quantizer)):
        some = min(cells, PROBE_GRAPH_CENTROIDS)
    parts = _taken_apart(dim, re.sub(r"IVF\d+", f"IVF{some}", factory, count=1))
    training, seen = 0.0, keys
    for transform in parts.transforms:
        training += _transform_seconds(transform, seen, sample)
        seen = transform.apply(seen)
    placed = 0.0
    if parts.lists is not None:
        seconds, placed = _cell_seconds(parts.lists, cells, seen, sample)
        training += seconds
    training += _code_seconds(parts.inner, seen, sample)
    parts.whole.is_trained = True
    adding = _adding(parts.whole, keys)
    if _is_graph(parts.inner):
        adding *= math.log(max(n_rows, len(keys), 2)) / math.log(max(len(keys), 2))
    return BuildTime(training, n_rows * (adding + placed), _measuring_seconds(parts, factory, cells, examples, n_rows))


def _taken_apart(dim: int, factory: str) -> _Parts:
    import faiss

    whole = empty_index(dim, factory)
    transforms: list[Any] = []
    inner = _of_kind(whole)
    while isinstance(inner, faiss.IndexPreTransform):
        chain: Any = inner.chain
        transforms += [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]
        inner = _of_kind(inner.index)
    return _Parts(whole, tuple(transforms), inner)


def _of_kind(index: Any) -> Any:
    import faiss

    return faiss.downcast_index(index)


def _is_graph(index: Any) -> bool:
    import faiss

    return isinstance(index, faiss.IndexHNSW)


# ---------------------------------------------------------------------- bytes


def _row_bytes(index: Any, factory: str) -> float:
    """Bytes a row of an index without inverted lists."""
    links = 0.0
    if _is_graph(index):
        graph: Any = index.hnsw
        above = graph.nb_neighbors(1)
        # Neighbours at the ground level, those of the few rows above it, and where each row's begin.
        links, index = 4 * graph.nb_neighbors(0) + 4 * above / (above - 1) + 12, _of_kind(index.storage)
    try:
        return int(index.sa_code_size()) + links
    except RuntimeError:
        raise InvalidInput(
            f"what an index {factory!r} takes is not known; estimate an IVF, PQ, SQ or HNSW index"
        ) from None


def _list_bytes(lists: Any, n_rows: int) -> int:
    import faiss

    code = int(lists.code_size)
    if hasattr(lists, "refine_pq"):
        code += int(lists.refine_pq.code_size)
    padding = 0
    if isinstance(lists, faiss.IndexIVFFastScan):
        padding = min(int(lists.nlist), n_rows) * BLOCK_ROWS // 2 * code
    return n_rows * (code + 8) + padding + 8 * int(lists.nlist)


def _code_book_bytes(index: Any) -> int:
    product = getattr(index, "pq", None)
    return 0 if product is None else 4 * int(product.ksub) * int(product.d)


def _table_bytes(lists: Any) -> int:
    """Distances between the centroids of cells and of codes, which faiss keeps in RAM up to 2 GiB of them."""
    import faiss

    product = getattr(lists, "pq", None)
    if product is None or not lists.by_residual:
        return 0
    n_bytes = 4 * int(lists.nlist) * int(product.M) * int(product.ksub)
    most: int = faiss.cvar.precomputed_table_max_bytes  # type: ignore[attr-defined]
    return n_bytes if n_bytes <= most else 0


# ---------------------------------------------------------------------- seconds


def _transform_seconds(transform: Any, keys: Float[ndarray, "n d"], sample: int) -> float:
    """Learning a rotation: of the many iterations that an OPQ matrix takes one is timed."""
    if transform.is_trained:
        return 0.0
    iterations, most, some = 1.0, sample, keys
    if hasattr(transform, "niter_pq_0"):
        iterations = transform.niter - 1 + transform.niter_pq_0 / transform.niter_pq
        transform.niter, transform.niter_pq_0 = 1, transform.niter_pq
        most, some = min(sample, transform.max_train_points), keys[:OPQ_ROWS]
    elif hasattr(transform, "max_points_per_d"):
        most = min(sample, transform.max_points_per_d * transform.d_in)
    return timed(lambda: transform.train(some)) * iterations * max(most / len(some), 1.0)


def _cell_seconds(lists: Any, cells: int, keys: Float[ndarray, "n d"], sample: int) -> tuple[float, float]:
    """Seconds of learning the cells, and what a row more takes to be assigned than it does in this smaller index."""
    import faiss

    some, quantizer = int(lists.nlist), _of_kind(lists.quantizer)
    centroids = example_keys(some, int(lists.d))
    graph = _is_graph(quantizer)
    if not quantizer.is_trained:
        quantizer.train(centroids)
    placing = timed(lambda: quantizer.add(centroids))
    flat = faiss.IndexFlatL2(int(lists.d))
    flat.add(centroids)
    comparing = seconds_per_row(lambda block: flat.search(block, 1), keys, PROBE_SECONDS)
    training = comparing / some * _comparisons(cells, sample, int(lists.cp.niter))
    if not graph:
        return training + placing * cells / some, comparing * (cells / some - 1)
    slower = math.log(max(cells, 2)) / math.log(max(some, 2))
    finding = seconds_per_row(lambda block: quantizer.search(block, 1), keys, PROBE_SECONDS)
    return training + placing * slower * cells / some, finding * (slower - 1)


def _comparisons(cells: int, sample: int, rounds: int) -> float:
    """How often the k-means of the cells compares a row with a centroid: at one level, or at two."""
    if cells < TWO_LEVELS_FROM or sample < cells:
        return float(rounds * sample * cells)
    few = cells**0.5
    return few * (TOP_ROUNDS * min(sample, POINTS_PER_CENTROID * few) + (1 + ROUNDS) * sample)


def _measuring_seconds(parts: _Parts, factory: str, cells: int, keys: ExampleKeys, n_rows: int) -> float:
    """Measuring the recall: the true neighbours by all distances, and for each effort two searches and one scoring.

    The efforts double, so inverted lists are gone through about as often as twice the last one goes through them; that
    one is taken to find enough in half of them. A list takes as long as a block of codes more than it holds. A graph
    goes through as much at each effort, since the shortlist is longer.
    """
    import faiss

    asked, length = keys.whole[:QUERIES_TIMED], min(int(LISTED * FACTORS[-1]), len(keys))
    through = 0.0 if _is_graph(parts.inner) else 2 * n_rows / len(keys)
    if parts.lists is not None:
        parts.lists.nprobe = int(parts.lists.nlist)
        through = 2 * (n_rows + BLOCK_ROWS * cells) / (len(keys) + BLOCK_ROWS * parts.lists.nlist)
    short = timed(lambda: parts.whole.search(asked, min(LISTED, len(keys))), times=2) / len(asked)
    long = timed(lambda: parts.whole.search(asked, length)) / len(asked)
    listed = np.random.default_rng(0).integers(0, len(keys), (len(asked), length))
    scoring = timed(lambda: pair_distances(keys, asked, listed)) / len(asked)
    longer = 2 * long if _is_graph(parts.inner) else max(long - short, 0.0)
    everyone, near = example_keys(QUERIES, keys.width), min(max(NEIGHBORS), len(keys))
    reach = seconds_per_row(lambda some: faiss.knn(everyone, some, min(near, len(some))), keys.whole, PROBE_SECONDS)
    return QUERIES * (len(efforts_of(factory)) * (longer + scoring) + through * short) + n_rows * reach


def _code_seconds(index: Any, keys: Float[ndarray, "n d"], sample: int) -> float:
    """Learning the codes. The index is trained by it, though badly."""
    holder = _of_kind(index.storage) if _is_graph(index) else index
    products = [getattr(holder, name) for name in ("pq", "refine_pq") if hasattr(holder, name)]
    if not products:
        return 0.0 if holder.is_trained else timed(lambda: index.train(keys)) * max(sample / len(keys), 1.0)
    total = sum(_product_seconds(product, keys, sample) for product in products)
    if getattr(holder, "do_polysemous_training", False):
        total += sum(map(_reordering_seconds, products[:1]))
        holder.do_polysemous_training = False
    for product in products:
        product.cp.niter, product.cp.max_points_per_centroid, product.cp.min_points_per_centroid = 1, 8, 1
    index.train(keys)
    return total


def _product_seconds(product: Any, keys: Float[ndarray, "n d"], sample: int) -> float:
    """k-means of one of the parts of a code, with few iterations, for all."""
    import faiss

    width, iterations = int(product.dsub), 2
    most = min(sample, int(product.ksub) * int(product.cp.max_points_per_centroid))
    some = np.ascontiguousarray(keys[:most, :width])
    clustering = faiss.Clustering(width, int(product.ksub))
    clustering.niter, clustering.min_points_per_centroid = iterations, 1
    clustering.max_points_per_centroid = int(product.cp.max_points_per_centroid)
    seconds = timed(lambda: clustering.train(some, faiss.IndexFlatL2(width)), times=3)
    return seconds * int(product.M) * product.cp.niter / iterations * most / len(some)


def _reordering_seconds(product: Any) -> float:
    """Renumbering centroids so that near ones have like codes, which faiss does for codes of whole bytes."""
    import faiss

    one = faiss.ProductQuantizer(int(product.dsub), 1, int(product.nbits))
    centroids = example_keys(int(product.ksub), int(product.dsub))
    faiss.copy_array_to_vector(centroids.ravel(), one.centroids)
    annealing = faiss.PolysemousTraining()  # type: ignore[attr-defined]
    full, annealing.n_iter = annealing.n_iter, 5000
    seconds = timed(lambda: annealing.optimize_pq_for_hamming(one, len(centroids), faiss.swig_ptr(centroids)))
    return seconds * int(product.M) * full / annealing.n_iter


def _adding(index: Any, keys: Float[ndarray, "n d"]) -> float:
    """Seconds a row of filling an index with the keys, until they are used up or the time is."""
    size = max(len(keys) // 8, 1)
    spent, filled = 0.0, 0
    while filled < len(keys) and spent < 4 * PROBE_SECONDS:
        block = keys[filled : filled + size]
        spent += timed(lambda: index.add(block))  # noqa: B023  called at once
        filled += len(block)
    return spent / filled
