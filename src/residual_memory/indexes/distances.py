"""The distance of one query and one key: the arithmetic that every answer rests on, whatever engine proposed the pair.

Differences are squared and summed pair by pair, so the distance of a key to itself is exactly 0, and a pair's distance
depends neither on what else is computed with it nor on where the key lies. Where faiss is installed its loop does the
work, otherwise numpy's; the two agree to the rounding of the sum.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray

SCRATCH_BYTES = 1 << 20  # gathered keys that are scored at a time: stays in a core's cache
MOST_SCRATCH = 8  # times as much where the keys lie in as many parts, each of which costs some calls
HALF_BLOCK = 1 << 16  # numbers of half precision that are converted at a time, in a core's cache


@runtime_checkable
class KeySource(Protocol):
    """Keys in rows, in RAM or on disk: what an index is built from and re-scored with."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def whole(self) -> ndarray | None:
        """All keys as one array, where they are one."""

    @property
    def n_parts(self) -> int:
        """Arrays that the keys lie in."""

    def take(self, rows: Int64[ndarray, "..."]) -> Shaped[ndarray, "... d"]: ...

    def gathered(self, rows: Int64[ndarray, " m"]) -> tuple[Shaped[ndarray, "m d"], Int64[ndarray, " m"]]:
        """The keys of these rows in the order in which they are read fastest, and the place of each row's."""

    def blocks(self, size: int, first: int = 0) -> Iterator[Shaped[ndarray, "b d"]]: ...

    def opener(self, first: int, n_rows: int) -> "Callable[[], KeySource]":
        """What gives some of the rows, numbered from 0, in another process, to which it can be sent."""


def pair_distances(
    keys: KeySource, queries: Float[ndarray, "q d"], rows: Int64[ndarray, "q s"]
) -> Float[ndarray, "q s"]:
    """Euclidean distances between each query and its rows; +inf where a row is −1.

    Computed in float32, or in float64 where the keys are stored so.
    """
    dtype = precision_of(keys)
    queries = np.ascontiguousarray(queries, dtype)
    if dtype == np.float64 or not _has_faiss():
        squared = _gathered_squares(keys, queries, rows)
    else:
        squared = _squares_by_faiss(keys, queries, rows)
    distances = np.sqrt(squared, dtype=np.float64)
    distances[rows < 0] = np.inf
    return distances


def distances_among(keys: KeySource, rows: Int64[ndarray, "q k"]) -> Float[ndarray, "q k k"]:
    """Euclidean distances among the rows of each query; +inf where a row is −1.

    Inner products relative to the first row of each query, in float32, or in float64 where the keys are stored so:
    good to rounding for neighbours, which lie close together.
    """
    dtype = precision_of(keys)
    among = np.empty((*rows.shape, rows.shape[1]), dtype)
    if not len(keys):
        among.fill(np.inf)
        return among
    for piece in _pieces(rows.shape, keys):
        gathered = _computable(keys.take(np.maximum(rows[piece], 0)), dtype)
        gathered -= gathered[:, :1].copy()
        squares = np.einsum("qkd,qkd->qk", gathered, gathered)
        products = gathered @ gathered.transpose(0, 2, 1)
        squared = squares[:, :, None] + squares[:, None, :] - 2 * products
        among[piece] = np.sqrt(np.maximum(squared, 0))
    places = np.arange(rows.shape[1])
    among[:, places, places] = 0
    among[(rows < 0)[:, :, None] | (rows < 0)[:, None, :]] = np.inf
    return among


def precision_of(keys: KeySource) -> np.dtype:
    """The type in which distances to these keys are computed: float64 for float64 keys, float32 for all others."""
    return np.dtype(np.float64 if keys.dtype == np.float64 else np.float32)


def squared_error(dim: int, scale: Any) -> Any:
    """How far a squared distance computed in float32 by inner products may be from the true one.

    Parameters
    ----------
    scale : (‖query‖ + largest ‖key‖)², of the centred vectors.

    References
    ----------
    Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019: rounding errors of a sum of d
    terms grow as sqrt(d) unless they conspire; 4 deviations and some slack for the subtraction of the centre.
    """
    return (4 * np.sqrt(dim) + 16) * np.finfo(np.float32).eps * scale


def _squares_by_faiss(
    keys: KeySource, queries: Float[ndarray, "q d"], rows: Int64[ndarray, "q s"]
) -> Float[ndarray, "q s"]:
    squared = np.empty(rows.shape, np.float32)
    whole = keys.whole
    if whole is not None and whole.dtype == np.float32 and whole.flags.c_contiguous:
        _by_faiss(squared, queries, whole, np.ascontiguousarray(rows))
        return squared
    for piece in _pieces(rows.shape, keys):
        gathered, places = keys.gathered(np.maximum(rows[piece], 0).ravel())
        singles = _computable(gathered, np.dtype(np.float32))
        _by_faiss(squared[piece], queries[piece], singles, places.reshape(rows[piece].shape))
    return squared


def _gathered_squares(
    keys: KeySource, queries: Float[ndarray, "q d"], rows: Int64[ndarray, "q s"]
) -> Float[ndarray, "q s"]:
    squared = np.empty(rows.shape, queries.dtype)
    for piece in _pieces(rows.shape, keys):
        differences = _computable(keys.take(np.maximum(rows[piece], 0)), queries.dtype)
        differences -= queries[piece, None, :]
        np.einsum("qsd,qsd->qs", differences, differences, out=squared[piece])
    return squared


def _by_faiss(squared: ndarray, queries: ndarray, keys: ndarray, rows: ndarray) -> None:
    """Squared distances of each query to its rows of `keys`, written into `squared`."""
    import faiss

    pointers = [faiss.swig_ptr(array) for array in (squared, queries, keys, rows)]
    faiss.fvec_L2sqr_by_idx(*pointers, queries.shape[1], *rows.shape)  # type: ignore[attr-defined]


def _computable(keys: Shaped[ndarray, "..."], dtype: np.dtype) -> Shaped[ndarray, "..."]:
    """Gathered keys in the type that is computed in."""
    if keys.dtype != np.float16 or dtype != np.float32:
        return keys.astype(dtype, copy=False)
    singles = np.empty(keys.shape, np.float32)
    halves, bits = np.ascontiguousarray(keys).reshape(-1), singles.reshape(-1)
    for start in range(0, len(halves), HALF_BLOCK):
        _half_to_single(halves[start : start + HALF_BLOCK], bits[start : start + HALF_BLOCK])
    return singles


def _half_to_single(halves: Float[ndarray, " b"], singles: Float[ndarray, " b"]) -> None:
    """The same numbers in single precision: as numpy's conversion, which takes 8 times as long, if all are finite.

    Sign, exponent and mantissa move to their places in the wider word; what the exponents count from differs by 112.
    """
    words = singles.view(np.int32)
    np.copyto(words, halves.view(np.int16))
    np.left_shift(words, 13, out=words)
    np.bitwise_and(words, np.int32(-0x70002000), out=words)  # without the copies of the sign in the exponent
    np.multiply(singles, np.float32(2.0**112), out=singles)


def _pieces(shape: tuple[int, ...], keys: KeySource) -> Iterator[slice]:
    scratch = SCRATCH_BYTES * min(keys.n_parts, MOST_SCRATCH)
    step = max(1, scratch // max(1, shape[1] * keys.width * 8))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def scoring_threads() -> int:
    """Threads that score pairs at a time: as many as faiss uses; one without it, where numpy holds Python's lock."""
    if not _has_faiss():
        return 1
    import faiss

    return faiss.omp_get_max_threads()


def leave_a_core() -> None:
    """Let faiss use one thread less on the calling thread: they wait for each other in a loop where one is held up."""
    if _has_faiss():
        import faiss

        faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() - 1))


@cache
def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None
