"""How well an approximate index finds the neighbours, measured on the rows themselves, and how hard it has to look.

Rows of the index are asked for their own neighbours, themselves left out. One search for each effort tells the recall
of every shorter list too, so that options of queries can be chosen, and chosen again, without another build.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

from residual_memory.errors import CorruptFile, InvalidInput
from residual_memory.indexes.base import Measured, listed_for
from residual_memory.indexes.distances import KeySource, pair_distances

QUERIES = 500
NEIGHBORS = (10, 25, 50)  # the recall of a shortlist of so many times k falls as k does, where keys lie in clusters
LISTED = listed_for(max(NEIGHBORS))
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
ENOUGH, NO_GAIN = 0.999, 0.0005  # recall at which no harder search is tried, and a gain that is none
MARGIN = 0.25  # of the misses that are allowed, left for queries that are not the sample
KEYS_PER_BLOCK = 1 << 16
SAME = 1e-5  # relative difference of two distances that are the same but for rounding

_Result = TypeVar("_Result")
Lister = Callable[[Float[ndarray, "q d"], int], Int64[ndarray, "q s"]]  # rows in the order of the index's own distances


@dataclass(frozen=True)
class Point:
    """A way of querying, and what it gave.

    Attributes
    ----------
    effort : cells, or vertices of a graph, that a query looks at; 0 for an index that always looks at everything.
    k_factor : how many times k the shortlist is long.
    recalls : share of the true neighbours that were in the shortlist, for each number of them.
    seconds : a query, the scoring of its shortlist included.
    """

    effort: float
    k_factor: float
    recalls: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Calibration:
    """What was measured of an index.

    Attributes
    ----------
    n_neighbors : for each of which recall was measured.
    """

    n_queries: int
    n_neighbors: tuple[int, ...]
    points: tuple[Point, ...]

    def cheapest(self, recall: float, listed: int, named: Mapping[str, float]) -> Point:
        """The fastest way to a recall, with a margin; the one that comes nearest to it where none gets there.

        Parameters
        ----------
        listed : how many rows the index is asked for.
        named : `effort` and `k_factor` where they may not be chosen; a way with them was measured (`covers`).
        """
        allowed = self._allowed(named)
        place, aim = self._place(listed), recall + MARGIN * (1 - recall)
        reaching = [point for point in allowed if point.recalls[place] >= aim]
        return min(reaching, key=lambda p: p.seconds) if reaching else max(allowed, key=lambda p: p.recalls[place])

    def covers(self, named: Mapping[str, float]) -> bool:
        """Whether a way with these was measured."""
        return bool(self._allowed(named))

    def recall(self, effort: float, k_factor: float, listed: int) -> float | None:
        """At least what one way of asking for so many rows finds: the best measured that looks no harder, if any."""
        place = self._place(listed)
        easier = (p.recalls[place] for p in self.points if p.effort <= effort and p.k_factor <= k_factor)
        return max(easier, default=None)

    def _allowed(self, named: Mapping[str, float]) -> list[Point]:
        return [p for p in self.points if all(getattr(p, name) == value for name, value in named.items())]

    def _place(self, listed: int) -> int:
        """Of the largest number of neighbours that was measured and is not above that of a search: fewer are harder."""
        return max((place for place, k in enumerate(self.n_neighbors) if listed_for(k) <= listed), default=0)

    @staticmethod
    def read(body: Measured) -> "Calibration":
        """Of what was saved.

        Raises
        ------
        CorruptFile : if it is none.
        """
        try:
            points = [
                Point(
                    float(entry["effort"]),
                    float(entry["k_factor"]),
                    tuple(map(float, entry["recalls"])),
                    float(entry["seconds"]),
                )
                for entry in body["points"]
            ]
            counts = tuple(map(int, body["n_neighbors"]))
            if not points or any(len(point.recalls) != len(counts) for point in points):
                raise ValueError("it has no point, or recalls of other numbers of neighbours")
            return Calibration(int(body["n_queries"]), counts, tuple(points))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"what was measured of a saved index cannot be read: {error!r}") from error


def as_recall(recall: float) -> float:
    """A recall that can be asked for.

    Raises
    ------
    InvalidInput : if it is none.
    """
    if not 0 < recall <= 1:
        raise InvalidInput(f"index option recall is {recall:g}, expected a number above 0 and at most 1")
    return recall


def calibrated(
    keys: KeySource,
    first: int,
    n_rows: int,
    lister: Callable[[float], Lister],
    efforts: Sequence[float],
    factors: Sequence[float],
    usual: float,
    without: Int64[ndarray, " t"],
) -> Calibration:
    """Measure an index over rows `first` … `first + n_rows − 1`.

    Parameters
    ----------
    lister : gives, for an effort, the search of the index.
    efforts : ascending; the last ones are left out where they cannot find more.
    factors : lengths of shortlists, in units of what `nearest` asks for; ascending.
    usual : an effort that is measured in any case.
    without : rows that the index was trained on, which it finds too easily: they are asked only where there are few
        others.
    """
    rows = _asked(first, n_rows, without)
    queries = np.ascontiguousarray(keys.take(rows), np.float32)
    counts = tuple(k for k in NEIGHBORS if k < n_rows) or (max(n_rows - 1, 1),)
    reach = _true_reach(keys, first, n_rows, queries, rows, counts)
    lengths = [min(int(LISTED * factor), n_rows) for factor in factors]
    points: list[Point] = []
    best, enough = 0.0, False
    for effort in efforts:
        if enough and effort != usual:
            continue
        search = lister(effort)
        short, _ = _timed(partial(search, queries, lengths[0]))
        whole, listed = _timed(partial(search, queries, lengths[-1]))
        scoring, distances = _timed(partial(pair_distances, keys, queries, listed))
        longer = max(whole - short, 0.0) / max(lengths[-1] - lengths[0], 1)
        distances[listed == rows[:, None]] = np.inf
        for factor, length in zip(factors, lengths, strict=True):
            recalls = tuple(
                _recall(distances[:, : int(listed_for(k) * factor)], near, k)
                for k, near in zip(counts, reach, strict=True)
            )
            seconds = short + longer * (length - lengths[0]) + scoring * length / lengths[-1]
            points.append(Point(effort, factor, recalls, seconds / len(queries)))
        least = min(points[-1].recalls)
        enough = enough or least >= ENOUGH or 0 < best >= least - NO_GAIN
        best = least
    return Calibration(len(queries), counts, tuple(points))


def _recall(distances: Float[ndarray, "q s"], reach: Float[ndarray, " q"], k: int) -> float:
    """Share of the k true neighbours that are listed: by distance, so that ties do no harm."""
    near = (distances <= reach[:, None] * (1 + SAME)).sum(axis=1)
    return float(np.minimum(near, k).mean() / k)


def _asked(first: int, n_rows: int, without: Int64[ndarray, " t"]) -> Int64[ndarray, " q"]:
    random = np.random.default_rng(0)
    drawn = first + random.permutation(np.unique(random.integers(0, n_rows, 4 * QUERIES)))
    others = drawn[~np.isin(drawn, without)]
    return (others if len(others) >= QUERIES // 2 else drawn)[:QUERIES]


def _timed(work: Callable[[], _Result]) -> tuple[float, _Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def true_distances(
    keys: KeySource, first: int, n_rows: int, queries: Float[ndarray, "q d"], k: int
) -> tuple[Float[ndarray, "q k"], Int64[ndarray, "q k"]]:
    """Distances to the k nearest of the rows `first` … `first + n_rows − 1`, ascending, and those rows.

    By faiss, block by block: nothing as large as the keys is held.
    """
    import faiss

    heap = faiss.ResultHeap(len(queries), k)
    start = first
    for block in _within(keys.blocks(KEYS_PER_BLOCK, first), n_rows):
        squared, rows = faiss.knn(queries, np.ascontiguousarray(block, np.float32), min(k, len(block)))
        heap.add_result(squared, rows + start)
        start += len(block)
    heap.finalize()
    distances = pair_distances(keys, queries, heap.I)
    order = np.argsort(distances, axis=1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(heap.I, order, 1)


def _true_reach(
    keys: KeySource,
    first: int,
    n_rows: int,
    queries: Float[ndarray, "q d"],
    own: Int64[ndarray, " q"],
    counts: Sequence[int],
) -> list[Float[ndarray, " q"]]:
    """Distance of each query to its k-th true neighbour, itself left out, for each k."""
    distances, rows = true_distances(keys, first, n_rows, queries, max(counts) + 1)
    others = np.sort(np.where(rows == own[:, None], np.inf, distances), axis=1)
    return [others[:, k - 1] for k in counts]


def _within(blocks: Iterator[ndarray], n_rows: int) -> Iterator[ndarray]:
    left = n_rows
    for block in blocks:
        if left <= 0:
            return
        yield block[:left]
        left -= len(block)
