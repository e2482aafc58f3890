"""The method itself: the soft k-nearest-neighbour regressor of residuals, and the corrected prediction."""

import copy
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import CorruptFile, DimensionMismatch, FewerNeighbors, InvalidInput
from residual_memory.indexes.base import Index, IndexSpec, Reject, Stored, Usable, nearest
from residual_memory.indexes.distances import distances_among
from residual_memory.indexes.registry import build_index, check_index, load_index, parse_spec, resolved, saved_spec
from residual_memory.kernels import KRIGING, as_nugget, check_kernel, kernel_named, kriging_weights
from residual_memory.memory import Column, Memory, Snapshot
from residual_memory.memory.saved import BuiltPart
from residual_memory.sparse import Recalled, whole
from residual_memory.types import Neighbors
from residual_memory.validation import (
    SUM_TOLERANCE,
    as_count,
    as_fraction,
    as_ids,
    as_keys,
    as_positive,
    as_values,
)

TABLE_BYTES = 256 << 20  # residuals of all rows are kept ready while they need no more than this
GATHER_BYTES = 2 << 20  # residuals gathered at a time
BANDWIDTH_SAMPLE = 1000


@dataclass(frozen=True)
class Found:
    """The memories nearest to each query.

    Attributes
    ----------
    ids : of the rows; −1 (or "") where there are fewer than k.
    distances : Euclidean, ascending; +inf where missing.
    weights : what each contributes; 0 where missing.
    complete : whether all rows were searched; False of a distributed index some parts of which did not answer.
    """

    ids: Shaped[ndarray, "q k"]
    distances: Float[ndarray, "q k"]
    weights: Float[ndarray, "q k"]
    complete: bool = True


@dataclass(frozen=True)
class ById:
    """For `exclude`: ids, and not groups, also in a memory whose groups are of the same type.

    Attributes
    ----------
    ids : [q], or several for each query [q e].
    """

    ids: ArrayLike


Exclude = ArrayLike | ById | None


@dataclass(frozen=True)
class Weighting:
    """How neighbours are weighted; the attributes are options of `ResidualKNN`."""

    kernel: str = "exponential"
    bandwidth: float = 1.0
    nugget: float = 0.1
    local: bool = False
    max_distance: float | None = None


@dataclass(frozen=True)
class Averages:
    """What the neighbours of each query say on average: the third seam.

    Attributes
    ----------
    residual : Σ w r.
    farthest : distance to the k-th neighbour; +inf where there are fewer.
    labels : Σ w onehot(y), or Σ w y; None where nobody asked.
    mass : Σ w: 1 for a kernel, 0 where no memory contributes, anything for kriging; None where nobody asked.
    """

    residual: Float[ndarray, "q c"]
    farthest: Float[ndarray, " q"]
    labels: Float[ndarray, "q c"] | None = None
    mass: Float[ndarray, " q"] | None = None

    def correction(self, predictions: Float[ndarray, "q p"], residual_share: float) -> Float[ndarray, "q c"]:
        """Σ w (y − β f(neighbour) − (1 − β) f(query)): the residuals at β = 1, the correction of kNN-LM at 0.

        Parameters
        ----------
        predictions : the base's for the queries; classes that only the memory knows count as probability 0.
        residual_share : β; below 1 the labels must have been asked for.

        Raises
        ------
        DimensionMismatch, InvalidInput : if the predictions do not fit, or the share is none.
        """
        if as_fraction("residual_share", residual_share) == 1:
            return self.residual
        assert self.labels is not None
        assert self.mass is not None
        pulled = self.labels - self.mass[:, None] * _fitting(predictions, self.residual)
        return (residual_share * self.residual + (1 - residual_share) * pulled).astype(self.residual.dtype)


@dataclass(frozen=True)
class _State:
    """An index that fits a snapshot, and the residuals of its rows where they are small enough to keep."""

    snapshot: Snapshot
    spec: IndexSpec
    parts: tuple[Index, ...]
    usable: Usable | None
    table: Float[ndarray, "n c"] | None


class ResidualKNN:
    """Predicts the base's residual at a key from the residuals of the nearest memories.

    It follows its memory: rows appended or forgotten through the same handle, or seen by its `refresh`, count from the
    next call on. Calls from several threads are safe.

    Parameters
    ----------
    memory : what to search.
    n_neighbors : k. With fewer rows all of them are used, and a warning says so.
    bandwidth : sigma, in the unit of the distances; "auto" is the median distance to the k-th neighbour (to the
        first for the inverse kernel, whose bandwidth is a floor) in a sample of the memory, taken once.
    kernel : "exponential" (the paper's), "gaussian", "inverse", "uniform", or "kriging", which also looks at how the
        neighbours lie to each other: more accurate on finer keys, at k² d more multiplications a query.
    temperature : T of the stored base predictions; temper the queries' predictions alike.
    index : "exact", "auto", or a spec such as "faiss:IVF1024,PQ64x4fs?nprobe=16".
    max_weight : what one row may contribute at most; 1 does not limit it. A cut weight is not given to the others.
    nugget : of kriging alone: what no neighbour can tell, as a part of the variance; at least 1e-6.
    local : the bandwidth is a multiple of each query's own distance to its k-th neighbour, wide where memories are
        sparse; "auto" is then 1.
    max_distance : memories farther away do not count; where there is no nearer one the base stands alone.

    Raises
    ------
    InvalidInput : if an option cannot be used.
    MissingExtra : if the index needs a package that is not installed.

    References
    ----------
    Yang et al., "ResMem: Learn what you can and memorize the rest", NeurIPS 2023.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        n_neighbors: int = 50,
        bandwidth: float | str = "auto",
        kernel: str = "exponential",
        temperature: float = 1.0,
        index: str = "exact",
        max_weight: float = 1.0,
        nugget: float = 0.1,
        local: bool = False,
        max_distance: float | None = None,
    ) -> None:
        self.memory = memory
        self.n_neighbors = as_count("n_neighbors", n_neighbors)
        self.kernel = kernel
        check_kernel(kernel)
        self.nugget = as_nugget(nugget)
        self.local = local
        self.max_distance = None if max_distance is None else as_positive("max_distance", max_distance)
        self.temperature = as_positive("temperature", temperature)
        _check_temperature(memory, self.temperature)
        self.max_weight = as_fraction("max_weight", max_weight, above_zero=True)
        check_index(index, memory.layout.dim)
        self._spec = parse_spec(index)
        self._building = threading.Lock()
        self._state: _State | None = None
        if isinstance(bandwidth, str):
            if bandwidth != "auto":
                raise InvalidInput(f"bandwidth is {bandwidth!r}, expected a number above 0 or 'auto'")
            self._bandwidth = None
        else:
            self._bandwidth = as_positive("bandwidth", bandwidth)
        if 0 < len(memory) < self.n_neighbors:
            warnings.warn(
                f"n_neighbors is {self.n_neighbors}, but the memory holds {len(memory)} rows: all of them are used",
                FewerNeighbors,
                stacklevel=2,
            )
        self._current()

    @property
    def bandwidth(self) -> float:
        """Sigma; where it is "auto", it is measured at the first use with at least two rows."""
        if self._bandwidth is None:
            if self.local or len(self.memory) < 2:
                return 1.0
            self._bandwidth = self._typical_distance()
        return self._bandwidth

    @property
    def description(self) -> str:
        """The engines that search, for people."""
        return ", ".join(dict.fromkeys(part.description for part in self._current().parts)) or "nothing to search"

    def __call__(self, keys: ArrayLike, exclude: Exclude = None) -> Float[ndarray, "q c"]:
        """The expected residual at each key; 0 where no memory contributes.

        Parameters
        ----------
        keys : queries [q d], from the layer that the memory was built from.
        exclude : for each query an id, or (in a memory with groups) a group, whose rows may not be used; it is read as
            a group where groups are of its type, else as an id (`ById` is an id always). Several of them are [q e].

        Raises
        ------
        InvalidInput, DimensionMismatch : if the keys do not fit the memory.
        """
        return self.look_up(keys, exclude).residual

    def look_up(self, keys: ArrayLike, exclude: Exclude = None, *, labels: bool = False) -> Averages:
        """What `__call__` gives, with the distance to the k-th neighbour and, on demand, what the labels say."""
        state, found = self._search(keys, self.n_neighbors, exclude)
        weights = self._weights(state.snapshot, found)
        residual = residual_average(state.snapshot, found.rows, weights, self.temperature, state.table)
        if not labels:
            return Averages(residual, found.farthest)
        alone = label_average(state.snapshot, found.rows, weights[:, None, :])[:, 0]
        return Averages(residual, found.farthest, alone, weights.sum(axis=1))

    def spread(
        self, keys: ArrayLike, exclude: Exclude = None, *, around: Float[ndarray, "q c"] | None = None
    ) -> Float[ndarray, "q c"]:
        """Mean absolute residual of the k nearest memories: how far off the base was near each key.

        Parameters
        ----------
        keys, exclude : as in `__call__`.
        around : what is taken from the residuals first, such as their mean: what is left is what no correction tells.

        Returns
        -------
        NaN where there is no neighbour.

        References
        ----------
        Papadopoulos et al., "Regression conformal prediction with nearest neighbours", 2011.
        """
        state, found = self._search(keys, self.n_neighbors, exclude)
        present = (found.rows >= 0).astype(float)
        with np.errstate(invalid="ignore"):
            weights = present / present.sum(axis=1, keepdims=True)
        total = np.empty((len(weights), state.snapshot.layout.n_outputs))
        for piece in _pieces(len(weights), 8 * weights.shape[1] * total.shape[1]):
            left = _gathered(state.snapshot, found.rows[piece], self.temperature, state.table)
            left = np.abs(left if around is None else left - around[piece, None])
            np.matmul(weights[piece, None, :], left, out=total[piece, None, :])
        return total

    def memory_only(self, keys: ArrayLike, exclude: Exclude = None) -> Float[ndarray, "q c"]:
        """What the neighbours' labels say without the base: Σ w onehot(y), or Σ w y. The baseline of every table."""
        state, found = self._search(keys, self.n_neighbors, exclude)
        return label_average(state.snapshot, found.rows, self._weights(state.snapshot, found)[:, None, :])[:, 0]

    def neighbors(self, keys: ArrayLike, exclude: Exclude = None, *, n_neighbors: int | None = None) -> Found:
        """The memories that `__call__` would use, nearest first.

        Parameters
        ----------
        keys, exclude : as in `__call__`.
        n_neighbors : to see more or fewer; those that `__call__` would not use weigh 0.
        """
        k = self.n_neighbors if n_neighbors is None else as_count("n_neighbors", n_neighbors)
        state, found = self._search(keys, max(k, self.n_neighbors), exclude)
        weights = np.zeros(found.rows.shape)
        weights[:, : self.n_neighbors] = self._weights(state.snapshot, found.first(self.n_neighbors))
        shown = found.first(k)
        return Found(_ids_of(state.snapshot, shown.rows), shown.distances, weights[:, :k], shown.complete)

    def contributions(
        self,
        keys: ArrayLike,
        exclude: Exclude = None,
        *,
        predictions: Float[ndarray, "r p"] | None = None,
        residual_share: float = 1.0,
    ) -> tuple[Found, Float[ndarray, "q k c"]]:
        """The neighbours and what each adds to the residual; summed over k it is what `__call__` gives.

        Parameters
        ----------
        predictions, residual_share : as in `Averages.correction`, whose parts they are with a share below 1.
        """
        state, found = self._search(keys, self.n_neighbors, exclude)
        weights = self._weights(state.snapshot, found)
        added = _gathered(state.snapshot, found.rows, self.temperature, state.table)
        if as_fraction("residual_share", residual_share) != 1:
            assert predictions is not None
            pulled = _targets(state.snapshot, found.rows) - _fitting(predictions, added[:, 0])[:, None, :]
            added = (residual_share * added + (1 - residual_share) * pulled).astype(added.dtype)
        parts = weights[..., None] * added
        return Found(_ids_of(state.snapshot, found.rows), found.distances, weights, found.complete), parts

    def recall(self, keys: ArrayLike, n_neighbors: int | None = None, exclude: Exclude = None) -> Recalled:
        """What the nearest memories hold, for `sparse_residual`: nothing as wide as a large vocabulary is made.

        Parameters
        ----------
        keys, exclude : as in `__call__`.
        n_neighbors : other than the regressor's own k, for tuning.

        Raises
        ------
        InvalidInput : if the memory is of a regression.
        """
        if self.memory.layout.task == "regression":
            raise InvalidInput("the memory is of a regression, but classes are recalled from a classification")
        state, found = self._search(keys, self.n_neighbors if n_neighbors is None else n_neighbors, exclude)
        snapshot, rows = state.snapshot, np.maximum(found.rows, 0)
        ids = _ids_of(snapshot, found.rows)
        if not snapshot.n_rows:
            nothing = np.zeros((*rows.shape, 1), np.float32)
            return Recalled(ids, found.distances, rows, rows[:, :, None], nothing, nothing[:, :, 0])
        said = snapshot.top_m(rows) if snapshot.layout.residuals == "top-m" else whole(snapshot.predictions(rows))
        return Recalled(ids, found.distances, snapshot.targets(rows), said.indices, said.probabilities, said.rest)

    def with_kernel(self, *, n_neighbors: int, kernel: str, bandwidth: float) -> "ResidualKNN":
        """The same memory and index, weighted in another way: nothing is built again."""
        other = copy.copy(self)
        other._building = threading.Lock()
        other.n_neighbors, other.kernel = as_count("n_neighbors", n_neighbors), kernel
        check_kernel(kernel)
        other._bandwidth = as_positive("bandwidth", bandwidth)
        return other

    def weights(self, distances: Float[ndarray, "q k"]) -> Float[ndarray, "q k"]:
        """What neighbours at these distances count, by a kernel of distances alone."""
        if self.kernel == KRIGING:
            raise InvalidInput("kriging weighs neighbours by how they lie to each other, not by distances alone")
        return np.minimum(_kernel_weights(distances, self.weighting), self.max_weight)

    @property
    def weighting(self) -> Weighting:
        """What is said of weights in the options; a bandwidth of "auto" is measured."""
        return Weighting(self.kernel, self.bandwidth, self.nugget, self.local, self.max_distance)

    def search(self, keys: ArrayLike, n_neighbors: int, exclude: Exclude = None) -> tuple[Snapshot, Neighbors]:
        """Rows and distances of any number of neighbours, and the snapshot that the rows belong to."""
        state, found = self._search(keys, as_count("n_neighbors", n_neighbors), exclude)
        return state.snapshot, found

    def prepare(self) -> None:
        """Make the index fit the memory as it is now, so that the next query need not."""
        self._current()

    def save_index(self) -> None:
        """Keep the index with its memory, so that opening it again loads what would take long to build.

        A regressor with the same index then loads it, whatever the options of its queries, and builds only what is new
        or damaged. Each memory keeps one saved index, the last; `compact` removes it. It is derived: no answer rests on
        it but through the shortlists that it proposes.

        Raises
        ------
        InvalidInput : if the memory is in RAM, or the search is exact, which leaves nothing to save.
        ReadOnlyMemory : if the memory is open read-only.
        StorageFailure : if the disk refuses; an index saved earlier is still there.
        """
        state = self._current()
        built = [
            BuiltPart(part.saved_as, part.first, part.n_rows, part.description, part.measured(), part.saved)
            for part in state.parts
            if part.saved_as is not None
        ]
        if not built and self.memory.path is not None:
            raise InvalidInput(
                f"there is nothing to save of {self.description}: exact search is made from the keys; "
                "name an engine that is built, such as faiss:IVF1024,PQ64x4fs, and rows enough for it"
            )
        self.memory.save_parts(state.snapshot, built)

    def _search(self, keys: ArrayLike, k: int, exclude: Exclude) -> tuple[_State, Neighbors]:
        state = self._current()
        layout = state.snapshot.layout
        queries = as_keys(keys, layout.dim, metric=layout.metric)
        found = nearest(
            state.parts, state.snapshot.keys, queries, k,
            tie_ranks=state.snapshot.tie_ranks,
            usable=state.usable,
            reject=_reject(state.snapshot, exclude, len(queries)),
        )  # fmt: skip
        return state, found

    def _weights(self, snapshot: Snapshot, found: Neighbors) -> Float[ndarray, "q k"]:
        weights = neighbor_weights(snapshot.keys, found, self.weighting)
        return weights if self.max_weight == 1 else np.clip(weights, -self.max_weight, self.max_weight)

    def _current(self) -> _State:
        """The state for the memory's present snapshot, built or extended where needed."""
        state, snapshot = self._state, self.memory.snapshot
        if state is not None and state.snapshot.version >= snapshot.version:
            return state
        with self._building:
            if self._state is None or self._state.snapshot.version < snapshot.version:
                self._state = self._built(snapshot, self._state)
            return self._state

    def _built(self, snapshot: Snapshot, before: _State | None) -> _State:
        spec = resolved(self._spec, snapshot.layout.dim, snapshot.n_rows)
        same_rows = before is not None and before.snapshot.generation == snapshot.generation
        parts = list(before.parts) if before is not None and same_rows and before.spec.engine == spec.engine else []
        table = before.table if before is not None and same_rows else None
        parts += self._loaded(snapshot, sum(part.n_rows for part in parts))
        covered = sum(part.n_rows for part in parts)
        if covered < snapshot.n_rows:
            # New rows become a part of their own, joined with the last ones while these are no longer: few parts.
            while parts and parts[-1].n_rows <= snapshot.n_rows - covered:
                covered -= parts.pop().n_rows
            like = parts[0] if parts else None
            parts.append(build_index(spec, snapshot.keys, covered, snapshot.n_rows - covered, like))
        if snapshot.n_rows and (before is None or before.snapshot.n_rows < snapshot.n_rows or not same_rows):
            table = _residual_table(snapshot, self.temperature, table)
        usable = Usable(snapshot.alive) if len(snapshot.forgotten) else None
        return _State(snapshot, spec, tuple(parts), usable, table)

    def _loaded(self, snapshot: Snapshot, covered: int) -> Iterator[Index]:
        """Saved parts of this index that follow one another from the first row that is not covered."""
        for part in self.memory.saved_parts(snapshot):
            spec = saved_spec(self._spec, part.name, snapshot.layout.dim, snapshot.n_rows)
            if part.first != covered or spec is None or (pieces := self.memory.read_part(part)) is None:
                continue
            try:
                stored = Stored(pieces, part.measured)
                index = load_index(spec, snapshot.keys, part.first, part.n_rows, stored)
            except CorruptFile:
                continue
            covered = part.end
            yield index

    def _typical_distance(self) -> float:
        state = self._current()
        snapshot = state.snapshot
        alive = np.flatnonzero(snapshot.alive)
        rows = alive[np.unique(np.linspace(0, len(alive) - 1, min(BANDWIDTH_SAMPLE, len(alive))).astype(int))]
        k = 1 if self.kernel == "inverse" else min(self.n_neighbors, len(alive) - 1)
        found = nearest(
            state.parts, snapshot.keys, snapshot.keys.take(rows), k,
            usable=state.usable, reject=lambda positions, listed: listed == rows[positions, None],
        )  # fmt: skip
        present = np.where(np.isfinite(found.distances), found.distances, 0.0).max(axis=1)
        typical = float(np.median(present)) or float(present.mean())
        return typical if typical > 0 else 1.0


def _fitting(predictions: Float[ndarray, "r p"], residual: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
    """Predictions as wide as a residual, with probability 0 for the classes that only the memory knows."""
    if len(predictions) != len(residual) or predictions.shape[1] > residual.shape[1]:
        raise DimensionMismatch(f"predictions {predictions.shape} and residual {residual.shape} do not fit")
    return np.pad(predictions, ((0, 0), (0, residual.shape[1] - predictions.shape[1])))


def neighbor_weights(
    keys: Column, found: Neighbors, how: Weighting, among: Float[ndarray, "q k k"] | None = None
) -> Float[ndarray, "q k"]:
    """What each neighbour counts.

    Parameters
    ----------
    keys : of the rows.
    found : neighbours of each query.
    among : distances among the neighbours, where they are at hand; only kriging needs them.
    """
    if how.kernel != KRIGING:
        return _kernel_weights(found.distances, how)
    distances, unit = _measured(found.distances, how)
    weights, missing = np.zeros(found.rows.shape), np.isinf(distances)
    for piece in _pieces(len(found.rows), 8 * found.rows.shape[1] ** 2):
        between = distances_among(keys, found.rows[piece]) if among is None else among[piece]
        between = np.where(missing[piece, :, None] | missing[piece, None, :], np.inf, between / unit[piece, :, None])
        weights[piece] = kriging_weights(distances[piece], between, how.bandwidth, how.nugget)
    return weights


def _kernel_weights(distances: Float[ndarray, "q k"], how: Weighting) -> Float[ndarray, "q k"]:
    return kernel_named(how.kernel)(_measured(distances, how)[0], how.bandwidth)


def _measured(distances: Float[ndarray, "q k"], how: Weighting) -> tuple[Float[ndarray, "q k"], Float[ndarray, "q 1"]]:
    """Distances in the unit of the bandwidth, +inf where a memory is too far to count, and that unit."""
    unit = np.ones((len(distances), 1))
    if how.local and distances.shape[1]:
        farthest = np.where(np.isfinite(distances), distances, 0.0).max(axis=1, keepdims=True)
        unit = np.where(farthest > 0, farthest, 1.0)
    counted = distances if how.max_distance is None else np.where(distances > how.max_distance, np.inf, distances)
    return (counted / unit if how.local else counted), unit


def correct(predictions: ArrayLike, residual: ArrayLike, shrinkage: ArrayLike | float = 1.0) -> Float[ndarray, "q ..."]:
    """The corrected scores: predictions + shrinkage · residual.

    Parameters
    ----------
    predictions : base probabilities or values [q c]; classes that only the memory knows count as probability 0.
    residual : what `ResidualKNN` gives [q c].
    shrinkage : the part of the residual to trust, one number or one a query; 1 is the paper's, 0 gives the predictions
        back bit for bit.

    Raises
    ------
    DimensionMismatch : if the shapes differ.
    """
    base = as_values(predictions, name="predictions")
    added = as_values(residual, name="residual")
    base = base.astype(np.float32) if base.dtype == np.float16 else base
    if np.ndim(shrinkage) > 1:
        raise DimensionMismatch(f"shrinkage has shape {np.shape(shrinkage)}, expected one number, or one a query")
    amount = as_values(np.atleast_1d(np.asarray(shrinkage, float)), name="shrinkage")
    if amount.min(initial=0) < 0:
        raise InvalidInput(f"shrinkage holds {amount.min():g}, expected numbers from 0")
    if base.shape[1] < added.shape[1] and np.abs(base.sum(1) - 1).max(initial=0) <= SUM_TOLERANCE:
        base = np.pad(base, ((0, 0), (0, added.shape[1] - base.shape[1])))
    if base.shape != added.shape or len(amount) not in (1, len(base)):
        raise DimensionMismatch(
            f"predictions {base.shape}, residual {added.shape} and shrinkage {np.shape(shrinkage)} do not fit"
        )
    scores = np.where(amount == 0, base, base + (amount * added).astype(base.dtype))
    return scores[:, 0] if np.ndim(predictions) == 1 else scores


def to_probabilities(scores: ArrayLike, base: ArrayLike | None = None, *, floor: float = 0.1) -> Float[ndarray, "q c"]:
    """Valid distributions from corrected scores, which sum to 1 but may be negative.

    Parameters
    ----------
    scores : what `correct` gives [q c].
    base : the predictions that were corrected [q c]. With them no score falls below `floor` times what the base gave
        its class before the row is renormalised, so every probability is positive and log-loss is finite. Without them
        the scores are projected onto the simplex, which keeps their order but may give zeros: for ranking.
    floor : the part of a base probability that no correction can take away.

    References
    ----------
    Projection: Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008.
    """
    values = as_values(scores, name="scores")
    if base is None:
        return _projected(values)
    as_fraction("floor", floor, above_zero=True)
    given = as_values(base, name="base")
    if given.shape[1] < values.shape[1]:
        given = np.pad(given, ((0, 0), (0, values.shape[1] - given.shape[1])))
    if given.shape != values.shape:
        raise DimensionMismatch(f"base has shape {given.shape}, scores have {values.shape}")
    smallest = np.finfo(values.dtype).tiny ** 0.5
    positive = np.maximum(values, floor * np.maximum(given, smallest))
    return positive / positive.sum(axis=1, keepdims=True)


def _projected(scores: Float[ndarray, "q c"]) -> Float[ndarray, "q c"]:
    """The nearest point of the simplex."""
    descending = np.sort(scores, axis=1)[:, ::-1]
    excess = np.cumsum(descending, axis=1) - 1
    counts = np.arange(1, scores.shape[1] + 1)
    kept = (descending * counts > excess).sum(axis=1)
    threshold = np.take_along_axis(excess, kept[:, None] - 1, axis=1) / kept[:, None]
    return np.maximum(scores - threshold, 0)


def label_average(
    snapshot: Snapshot, rows: Int64[ndarray, "q k"], weights: Float[ndarray, "q s k"]
) -> Float[ndarray, "q s c"]:
    """Σ w onehot(y), or Σ w y for regression, of the same neighbours under s settings of the weights."""
    dtype, n_outputs = _computing_dtype(snapshot), snapshot.layout.n_outputs
    if not snapshot.n_rows:
        return np.zeros((*weights.shape[:2], n_outputs), dtype)
    return np.matmul(weights.astype(dtype), _targets(snapshot, rows))


def _targets(snapshot: Snapshot, rows: Int64[ndarray, "q k"]) -> Float[ndarray, "q k c"]:
    """onehot(y), or y, of every neighbour; what stands for a missing one has no meaning, its weight is 0."""
    dtype, n_outputs = _computing_dtype(snapshot), snapshot.layout.n_outputs
    if not snapshot.n_rows:
        return np.zeros((*rows.shape, n_outputs), dtype)
    targets = snapshot.targets(np.maximum(rows, 0))
    if snapshot.layout.task == "regression":
        return targets
    return (targets[..., None] == np.arange(n_outputs)).astype(dtype)


def residual_average(
    snapshot: Snapshot,
    rows: Int64[ndarray, "q k"],
    weights: Float[ndarray, "q k"],
    temperature: float,
    table: Float[ndarray, "n c"] | None = None,
) -> Float[ndarray, "q c"]:
    """Σ w r over the neighbours: the third seam.

    Parameters
    ----------
    rows, weights : of the neighbours; what weighs 0 has no effect.
    table : the residuals of all rows, where they are at hand.
    """
    n_outputs = snapshot.layout.n_outputs
    dtype = _computing_dtype(snapshot)
    total = np.zeros((len(rows), n_outputs), dtype)
    weights = weights.astype(dtype)
    for piece in _pieces(len(rows), rows.shape[1] * n_outputs * total.itemsize):
        np.matmul(
            weights[piece, None, :], _gathered(snapshot, rows[piece], temperature, table), out=total[piece, None, :]
        )
    return total


def residual_averages(
    snapshot: Snapshot, rows: Int64[ndarray, "q k"], weights: Float[ndarray, "q s k"], temperature: float
) -> Float[ndarray, "q s c"]:
    """Σ w r of the same neighbours under s settings of the weights; all residuals of these queries are held at once."""
    if not snapshot.n_rows:
        return np.zeros((*weights.shape[:2], snapshot.layout.n_outputs), np.float32)
    residuals = _gathered(snapshot, rows, temperature, None)
    return np.matmul(weights.astype(residuals.dtype), residuals)


def _gathered(
    snapshot: Snapshot, rows: Int64[ndarray, "q k"], temperature: float, table: Float[ndarray, "n c"] | None
) -> Float[ndarray, "q k c"]:
    """The residual of every neighbour; what stands for a missing one has no meaning, its weight is 0."""
    shape = (*rows.shape, snapshot.layout.n_outputs)
    if not snapshot.n_rows:
        return np.zeros(shape, _computing_dtype(snapshot))
    present = np.maximum(rows, 0)
    if table is not None:
        return np.take(table, present, axis=0)
    return snapshot.residuals(present.ravel(), temperature).reshape(shape)


def _computing_dtype(snapshot: Snapshot) -> type[np.floating]:
    return np.float64 if snapshot.layout.prediction_dtype == "float64" else np.float32


def _pieces(n: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, GATHER_BYTES // max(1, row_bytes))
    return (slice(start, start + step) for start in range(0, n, step))


def _residual_table(
    snapshot: Snapshot, temperature: float, before: Float[ndarray, "m c"] | None
) -> Float[ndarray, "n c"] | None:
    """The residuals of all rows, going on from those of the first m; None if they would take too much room."""
    itemsize = np.dtype(_computing_dtype(snapshot)).itemsize
    if snapshot.layout.residuals == "top-m" or snapshot.n_rows * snapshot.layout.n_outputs * itemsize > TABLE_BYTES:
        return None
    known = 0 if before is None else len(before)
    fresh = snapshot.residuals(np.arange(known, snapshot.n_rows), temperature)
    return fresh if before is None else np.concatenate([before, fresh])


def _reject(snapshot: Snapshot, exclude: Exclude, n_queries: int) -> Reject | None:
    """Which rows a query excludes."""
    if exclude is None:
        return None
    by_id = isinstance(exclude, ById)
    given = np.atleast_1d(np.asarray(exclude.ids if isinstance(exclude, ById) else exclude))
    if given.ndim == 2 and len(given) != n_queries:
        raise DimensionMismatch(f"exclude has {len(given):,} rows for {n_queries:,} queries, expected one a query")
    several = given.shape[1] if given.ndim == 2 else 1
    excluded = as_ids(given.ravel(), n_queries * several, name="exclude").reshape(n_queries, several)
    names = _names_for(snapshot, excluded, ids_alone=by_id)

    def reject(positions: Int64[ndarray, " m"], rows: Int64[ndarray, "m s"]) -> Bool[ndarray, "m s"]:
        listed, unwanted = names.take(np.maximum(rows, 0)), excluded[positions]
        return np.logical_or.reduce([listed == unwanted[:, place, None] for place in range(several)])

    return reject


def _names_for(snapshot: Snapshot, excluded: Shaped[ndarray, "q e"], *, ids_alone: bool) -> Column:
    """The groups or the ids of all rows, whichever the excluded names can be."""
    for names in (None if ids_alone else snapshot.group_column, snapshot.id_column):
        if names is not None and (names.dtype.kind == excluded.dtype.kind or not len(names)):
            return names
    kinds = {"U": "strings", "i": "integers"}
    found = kinds[excluded.dtype.kind]
    raise InvalidInput(f"exclude holds {found}, but the memory's ids and groups are of another type")


def _ids_of(snapshot: Snapshot, rows: Int64[ndarray, "q k"]) -> Shaped[ndarray, "q k"]:
    ids = snapshot.id_column
    missing = "" if ids.dtype.kind == "U" else -1
    if not len(ids):
        return np.full(rows.shape, missing, ids.dtype)
    return np.where(rows >= 0, ids.take(np.maximum(rows, 0)), np.asarray(missing, ids.dtype))


def _check_temperature(memory: Memory, temperature: float) -> None:
    layout = memory.layout
    if temperature == 1.0:
        return
    if layout.task == "regression":
        raise InvalidInput(f"temperature is {temperature:g}, but a regression memory has none: use 1")
    if layout.residuals == "top-m":
        raise InvalidInput(
            f"temperature is {temperature:g}, but top-m rows are right for the temperature of their build, 1, alone"
        )
