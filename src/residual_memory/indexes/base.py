"""What an index is, and the one search that every engine goes through.

An engine proposes a shortlist; the search re-scores it pair by pair from the stored keys, orders it by
(distance, id) and, where the engine can promise it, proves that nothing nearer was left out. So an answer depends
neither on the engine's arithmetic, nor on blocks, parts or the order of the rows.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from numpy import ndarray

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.indexes.distances import KeySource, pair_distances, precision_of, scoring_threads
from residual_memory.indexes.footprint import BuildTime, Footprint
from residual_memory.types import Neighbors

WIDEST_BLOCK = 1 << 22  # candidates (queries x shortlist) that are held at a time

PAIRS_A_THREAD = 1 << 14  # of queries and candidates that one thread scores at a time
MOST_FORGOTTEN = 16  # a shortlist of which more than one in so many is forgotten is made again

Reject = Callable[[Int64[ndarray, " m"], Int64[ndarray, "m s"]], Bool[ndarray, "m s"]]

Measured = Mapping[str, Any]  # what an engine measured of an index, as JSON values
Pieces = Mapping[str, bytes | memoryview]  # what an engine built, as named bytes


@dataclass(frozen=True)
class Stored:
    """What was kept of an index.

    Attributes
    ----------
    pieces : what `Index.saved` gave.
    measured : what `Index.measured` gave.
    """

    pieces: Pieces
    measured: Measured | None = None


@dataclass(frozen=True)
class IndexSpec:
    """An engine, what to build, and how to query: "ENGINE:BUILD?NAME=VALUE&NAME=VALUE".

    Attributes
    ----------
    engine : a name of `registry`.
    build : what stands behind the colon: a backend of "exact", a factory string of faiss, options of scann, shards of
        ray.
    options : what stands behind the question mark.
    """

    engine: str
    build: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidates:
    """A shortlist for each query.

    Attributes
    ----------
    rows : in any order; −1 where there are no more.
    bounds : squared distance below which no row was left out, +inf where all rows are listed; None for an engine that
        promises nothing.
    complete : whether all rows were looked at; False where parts of a distributed index did not answer.
    """

    rows: Int64[ndarray, "q s"]
    bounds: Float[ndarray, " q"] | None
    complete: bool = True


class Index(ABC):
    """An index over rows `first` … `first + n_rows − 1` of a key source; immutable once built.

    The battery in `residual_memory.testing` says whether an engine's is right.
    """

    first: int
    n_rows: int

    @abstractmethod
    def candidates(
        self, queries: Float[ndarray, "q d"], n_neighbors: int, usable: "Usable | None" = None
    ) -> Candidates:
        """At least `n_neighbors` likely rows for each query (all rows where there are fewer).

        The shortlist is as wide with `usable` as without.

        Parameters
        ----------
        usable : rows that count; an engine that cannot pass over the others may list them too.
        """

    @property
    @abstractmethod
    def saved_as(self) -> str | None:
        """Engine, its version and what was built, as `Engine.saved_name` says it; None where nothing is kept."""

    @abstractmethod
    def saved(self) -> Pieces:
        """What was built, for `Engine.load`; empty where there is nothing worth keeping."""

    @abstractmethod
    def measured(self) -> Measured | None:
        """What was measured of it, its recall above all, to be kept with what is saved; None if nothing ever is.

        It is measured now where it was not yet.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """Engine and options, for people."""


def require(module: str, extra: str) -> None:
    """Refuse to go on without a package.

    Raises
    ------
    MissingExtra : naming what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"index engine {module!r}", extra)


def numbers_of(options: Mapping[str, str]) -> dict[str, float]:
    """The options of a spec as numbers.

    Raises
    ------
    InvalidInput : if one is none.
    """
    numbers = {}
    for name, value in options.items():
        try:
            numbers[name] = float(value)
        except ValueError:
            raise InvalidInput(f"index option {name}={value!r} is not a number") from None
    return numbers


class Engine(ABC):
    """Makes the indexes of one kind; `registry` names it. Its methods are called once it is known to be installed."""

    @abstractmethod
    def check(self, spec: IndexSpec, width: int) -> None:
        """Refuse a spec that this engine cannot build for keys of so many numbers, before there are rows.

        Raises
        ------
        InvalidInput : naming what is unknown and what was expected.
        """

    @abstractmethod
    def required_rows(self, spec: IndexSpec) -> int:
        """Rows below which such an index makes no sense; fewer are searched exactly."""

    @abstractmethod
    def footprint(self, spec: IndexSpec, width: int, n_rows: int) -> Footprint:
        """What such an index of so many rows will take, in RAM and on disk.

        Raises
        ------
        InvalidInput : if that is not known of this build string.
        """

    @abstractmethod
    def build_time(self, spec: IndexSpec, width: int, n_rows: int) -> BuildTime:
        """Seconds that building it will take on this machine, from a probe of a few; `extrapolated` is one."""

    @abstractmethod
    def build(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, like: Index | None = None) -> Index:
        """An index over some rows.

        Parameters
        ----------
        like : an index of this spec over earlier rows: what it learned of them may serve again.
        """

    @abstractmethod
    def saved_name(self, spec: IndexSpec) -> str | None:
        """What an index is saved as: engine, version, and what is built, without the options of its queries.

        None where nothing is worth keeping.
        """

    @abstractmethod
    def load(self, spec: IndexSpec, keys: KeySource, first: int, n_rows: int, stored: Stored) -> Index:
        """The index that was kept under the same `saved_name`.

        Raises
        ------
        InvalidInput : if an option does not fit.
        CorruptFile : if the engine cannot read it.
        """


class Usable:
    """Which rows count: all but the forgotten ones."""

    def __init__(self, rows: Bool[ndarray, " n"]) -> None:
        self.rows = rows
        self._packed: dict[tuple[int, int], UInt8[ndarray, " bytes"]] = {}

    def packed(self, part: Index) -> UInt8[ndarray, " bytes"]:
        """One bit for each row of a part, the lowest first; made once."""
        place = part.first, part.n_rows
        if place not in self._packed:
            self._packed[place] = np.packbits(self.rows[part.first : part.first + part.n_rows], bitorder="little")
        return self._packed[place]


def nearest(
    parts: Sequence[Index],
    keys: KeySource,
    queries: Float[ndarray, "q d"],
    n_neighbors: int,
    *,
    tie_ranks: Int64[ndarray, " n"] | None = None,
    usable: Usable | None = None,
    reject: Reject | None = None,
) -> Neighbors:
    """The nearest rows over all parts, in Euclidean distance, ties by rank.

    Parameters
    ----------
    parts : indexes over disjoint ranges of rows that cover all of `keys`.
    keys : what the shortlists are re-scored with.
    tie_ranks : order of rows at the same distance; None is row order.
    usable : rows that count; None: all of them.
    reject : called with query positions and their candidate rows; True where a row may not be used.

    Returns
    -------
    Neighbors, ascending, padded with −1 and +inf where there are fewer than `n_neighbors` usable rows.
    """
    found = Neighbors(np.full((len(queries), n_neighbors), np.inf), np.full((len(queries), n_neighbors), -1, np.int64))
    queries = queries.astype(precision_of(keys), copy=False)
    n_rows, complete = len(keys), True

    def rank(block: Int64[ndarray, " m"], rows: Int64[ndarray, "m s"]) -> None:
        ranked = _rescored(keys, queries[block], block, rows, n_neighbors, tie_ranks, usable, reject)
        k = ranked.rows.shape[1]
        found.distances[block, :k], found.rows[block, :k] = ranked.distances, ranked.rows

    pending, wanted = np.arange(len(queries)), listed_for(n_neighbors)
    while len(pending) and n_rows:
        wanted = min(wanted, n_rows)
        unsettled = []
        for block in np.array_split(pending, -(-len(pending) * wanted * len(parts) // WIDEST_BLOCK)):
            listed = _merged([_listed(part, queries[block], wanted, usable) for part in parts])
            complete = complete and listed.complete
            in_threads(rank, block, listed.rows)
            unsettled.append(block[~_settled(listed, found.distances[block], wanted >= n_rows)])
        pending, wanted = np.concatenate(unsettled), wanted * 4
    return replace(found, complete=complete)


def listed_for(n_neighbors: int) -> int:
    """How many rows an index is asked for, so that some may be rejected or tie."""
    return n_neighbors + 8 + n_neighbors // 8


def in_threads(
    work: Callable[[Int64[ndarray, " m"], Int64[ndarray, "m s"]], None],
    positions: Int64[ndarray, " q"],
    rows: Int64[ndarray, "q s"],
) -> None:
    """Run work on the queries of a block, in as many threads as there are, a few queries at a time."""
    threads = scoring_threads()
    pieces = min(len(positions), -(-rows.size // PAIRS_A_THREAD)) if threads > 1 else 1
    if pieces < 2:
        work(positions, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, np.array_split(positions, pieces), np.array_split(rows, pieces)))


def _listed(part: Index, queries: Float[ndarray, "m d"], wanted: int, usable: Usable | None) -> Candidates:
    """The shortlists of one part. Where forgotten rows take much of one, it is made again without them."""
    listed = part.candidates(queries, wanted)
    if usable is None or listed.bounds is not None:
        return listed
    forgotten = (~usable.rows[listed.rows] & (listed.rows >= 0)).sum(axis=1)
    crowded = np.flatnonzero(forgotten * MOST_FORGOTTEN > listed.rows.shape[1])
    if not len(crowded):
        return listed
    again = part.candidates(queries[crowded], wanted, usable)
    listed.rows[crowded] = again.rows
    return replace(listed, complete=listed.complete and again.complete)


def _rescored(
    keys: KeySource,
    queries: Float[ndarray, "m d"],
    positions: Int64[ndarray, " m"],
    rows: Int64[ndarray, "m s"],
    n_neighbors: int,
    tie_ranks: Int64[ndarray, " n"] | None,
    usable: Usable | None,
    reject: Reject | None,
) -> Neighbors:
    distances = pair_distances(keys, queries, rows)
    if usable is not None:
        distances[~usable.rows[rows]] = np.inf
    if reject is not None:
        distances[reject(positions, rows) & (rows >= 0)] = np.inf
    k = min(n_neighbors, rows.shape[1])
    kept = Neighbors(np.empty((len(rows), k)), np.empty((len(rows), k), np.int64))
    whole = np.ones(len(rows), bool)  # queries whose whole shortlist has to be put in order
    if 2 * k <= rows.shape[1]:
        places = np.argpartition(distances, k - 1, axis=1)[:, :k]
        near = Neighbors(np.take_along_axis(distances, places, 1), np.take_along_axis(rows, places, 1))
        last = near.distances.max(axis=1, keepdims=True)
        whole = (distances == last).sum(axis=1) > (near.distances == last).sum(axis=1)  # a tie goes by rank
        _order(near, tie_ranks)
        kept.distances[:], kept.rows[:] = near.distances, near.rows
    if whole.any():
        near = Neighbors(distances[whole], rows[whole])
        _order(near, tie_ranks)
        kept.distances[whole], kept.rows[whole] = near.distances[:, :k], near.rows[:, :k]
    return kept


def _order(found: Neighbors, tie_ranks: Int64[ndarray, " n"] | None) -> None:
    """Sort each query's neighbours in place, by distance and rank; −1 for those that do not count."""
    distances, rows = found.distances, found.rows
    order = np.argsort(distances, axis=1)
    distances[:], rows[:] = np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)
    rows[~np.isfinite(distances)] = -1
    tied = np.flatnonzero(((distances[:, 1:] == distances[:, :-1]) & (rows[:, 1:] >= 0)).any(axis=1))
    if len(tied):
        ranks = rows[tied] if tie_ranks is None else tie_ranks[rows[tied]]
        order = np.lexsort((ranks, distances[tied]), axis=1)
        rows[tied] = np.take_along_axis(rows[tied], order, 1)


def _settled(listed: Candidates, distances: Float[ndarray, "m k"], everything: bool) -> Bool[ndarray, " m"]:
    """For which queries no wider shortlist can change the answer."""
    if everything:
        return np.ones(len(distances), bool)
    if listed.bounds is not None:
        return distances[:, -1] ** 2 < listed.bounds
    return np.isfinite(distances[:, -1]) | (listed.rows < 0).any(axis=1)


def _merged(listed: Sequence[Candidates]) -> Candidates:
    if len(listed) == 1:
        return listed[0]
    promised = [part.bounds for part in listed if part.bounds is not None]
    rows = np.concatenate([part.rows for part in listed], axis=1)
    bounds = np.min(promised, axis=0) if len(promised) == len(listed) else None
    return Candidates(rows, bounds, all(part.complete for part in listed))
