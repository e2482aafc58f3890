"""The door: arrays and numbers of the user's, checked once; behind it they are trusted.

Every function names the argument, what was found and what was expected.
"""

import math
import operator
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped
from numpy import ndarray
from numpy.typing import ArrayLike

from residual_memory.errors import DimensionMismatch, InvalidInput
from residual_memory.types import Metric, Task, TopM

LARGEST_VALUE = 1e15  # its square times any width still fits float32, so no distance overflows
HALF_MAGNITUDE, HALF_INFINITY = np.uint16(0x7FFF), 0x7C00  # bits of a half without its sign; those of infinity
SUM_TOLERANCE = 2e-3  # of probabilities kept in half precision
LENGTH_TOLERANCE = 2e-3  # of keys of length 1 kept in half precision


def as_keys(
    keys: ArrayLike, dim: int | None = None, *, metric: Metric = "euclidean", name: str = "keys"
) -> Float[ndarray, "b d"]:
    """Floating keys [b d], finite and small enough for distances not to overflow; of length 1 under "cosine"."""
    array = _as_floats(name, keys)
    if array.ndim != 2:
        raise DimensionMismatch(f"{name} have shape {array.shape}, expected two axes: rows and dimensions")
    if dim is not None and array.shape[1] != dim:
        raise DimensionMismatch(
            f"{name} have dimension {array.shape[1]}, but the memory holds keys of dimension {dim}; "
            "do they come from the layer that the memory was built from?"
        )
    return _unit_length(array, name) if metric == "cosine" else array


def _unit_length(array: Float[ndarray, "b d"], name: str) -> Float[ndarray, "b d"]:
    wide = array.astype(np.float64)
    norms = np.sqrt(np.einsum("bd,bd->b", wide, wide))
    if len(norms) and norms.min() == 0:
        row = int(norms.argmin())
        raise InvalidInput(f"{name}[{row}] is zero, which has no direction: metric='cosine' cannot place it")
    return (wide / norms[:, None]).astype(array.dtype)


def as_unit_keys(keys: ArrayLike, dim: int | None = None) -> Float[ndarray, "b d"]:
    """Keys that have length 1 already, as near as half precision can say, to the last bit as they are."""
    array = as_keys(keys, dim)
    norms = np.sqrt(np.einsum("bd,bd->b", array, array, dtype=np.float64))
    if len(norms) and (worst := np.abs(norms - 1)).max() > LENGTH_TOLERANCE:
        row = int(worst.argmax())
        raise InvalidInput(f"keys[{row}] has length {norms[row]:.4g}, expected 1, as metric='cosine' stores keys")
    return array


def as_probabilities(
    predictions: ArrayLike, n_outputs: int | None = None, *, name: str = "predictions"
) -> Float[ndarray, "b c"]:
    """Rows of probabilities [b c], narrower ones filled up with classes of probability 0."""
    array = _as_floats(name, predictions)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DimensionMismatch(f"{name} have shape {array.shape}, expected two axes: rows and classes")
    if array.size and array.min() < 0:
        row = int(np.argmin(array.min(axis=1)))
        raise InvalidInput(
            f"{name}[{row}] holds {array[row].min():.4g}, expected probabilities; logits go through softmax first"
        )
    totals = array.sum(axis=1, dtype=np.float64)
    if len(totals) and (worst := np.abs(totals - 1).max()) > SUM_TOLERANCE:
        row = int(np.abs(totals - 1).argmax())
        raise InvalidInput(
            f"{name}[{row}] sums to {totals[row]:.6g}, off by {worst:.3g}, expected 1 within {SUM_TOLERANCE}; "
            "logits go through softmax first"
        )
    return widened(array, n_outputs, name=name)


def widened(array: Float[ndarray, "b c"], n_outputs: int | None, *, name: str) -> Float[ndarray, "b e"]:
    """Probabilities with a column of zeros for every class that the base never saw."""
    if n_outputs is None or array.shape[1] == n_outputs:
        return array
    if array.shape[1] > n_outputs:
        raise DimensionMismatch(f"{name} have {array.shape[1]} classes, but the memory has {n_outputs}")
    return np.pad(array, ((0, 0), (0, n_outputs - array.shape[1])))


def as_values(values: ArrayLike, n_outputs: int | None = None, *, name: str) -> Float[ndarray, "b c"]:
    """Regression targets or predictions; one axis is read as one output."""
    array = _as_floats(name, values)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or (n_outputs is not None and array.shape[1] != n_outputs):
        width = "" if n_outputs is None else f" of width {n_outputs}"
        raise DimensionMismatch(f"{name} have shape {array.shape}, expected one row an example{width}")
    return array


def as_predictions(
    predictions: "ArrayLike | TopM", task: Task, n_outputs: int | None = None
) -> "Float[ndarray, 'b c'] | TopM":
    """Base predictions as the task wants them."""
    if isinstance(predictions, TopM):
        return _as_top_m(predictions, n_outputs)
    if task == "classification":
        return as_probabilities(predictions, n_outputs)
    return as_values(predictions, n_outputs, name="predictions")


def _as_top_m(predictions: TopM, n_outputs: int | None) -> TopM:
    indices = np.asarray(predictions.indices)
    probabilities = _as_floats("predictions.probabilities", predictions.probabilities)
    rest = _as_floats("predictions.rest", predictions.rest)
    if indices.ndim != 2 or indices.shape != probabilities.shape or rest.shape != indices.shape[:1]:
        raise DimensionMismatch(
            f"TopM has indices {indices.shape}, probabilities {probabilities.shape} and rest {rest.shape}, "
            "expected [b m], [b m] and [b]"
        )
    if indices.shape[1] == 0:
        raise InvalidInput("TopM lists no class at all, expected m of at least 1")
    if not np.issubdtype(indices.dtype, np.integer):
        raise InvalidInput(f"TopM indices are {indices.dtype}, expected integers")
    if indices.size and (indices.min() < 0 or (n_outputs is not None and indices.max() >= n_outputs)):
        raise InvalidInput(f"TopM indices go from {indices.min()} to {indices.max()}, expected 0 to {n_outputs} − 1")
    ordered = np.sort(indices, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise InvalidInput("TopM indices name a class twice in one row")
    totals = probabilities.sum(axis=1, dtype=np.float64) + rest
    if len(totals) and (min(probabilities.min(), rest.min()) < 0 or np.abs(totals - 1).max() > SUM_TOLERANCE):
        raise InvalidInput("TopM probabilities and rest are not distributions: negative, or not summing to 1")
    return TopM(indices, probabilities, rest)


def as_labels(labels: ArrayLike, task: Task, n_outputs: int, n_rows: int) -> Shaped[ndarray, "b ..."]:
    """Class indices [b], or targets [b c]."""
    if task == "regression":
        array: ndarray = as_values(labels, n_outputs, name="labels")
    else:
        array = as_class_indices(labels, n_outputs)
    if len(array) != n_rows:
        raise DimensionMismatch(f"there are {len(array):,} labels for {n_rows:,} keys")
    return array


def as_class_indices(labels: ArrayLike, n_outputs: int) -> Int64[ndarray, " b"]:
    """Class indices [b] in 0 … n_outputs − 1."""
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise InvalidInput(f"labels are no plain list of class indices: {error}") from None
    if array.ndim != 1:
        raise DimensionMismatch(f"labels have shape {array.shape}, expected one class index an example")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InvalidInput(f"labels are {array.dtype}, expected integers from 0 to {n_outputs - 1}")
    if array.size and (array.min() < 0 or array.max() >= n_outputs):
        row = int(np.argmax((array < 0) | (array >= n_outputs)))
        raise InvalidInput(
            f"labels[{row}] is {array[row]}, expected 0 to {n_outputs - 1}; "
            "a memory made with a larger n_outputs has room for classes that the base never saw"
        )
    return array.astype(np.int64)


def as_ids(ids: ArrayLike, n_rows: int | None = None, *, name: str = "ids") -> Shaped[ndarray, " b"]:
    """Ids or groups: int64 ≥ 0, or strings."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{name} are no plain list of integers or strings: {error}") from None
    if array.ndim != 1 or (n_rows is not None and len(array) != n_rows):
        expected = "one axis" if n_rows is None else f"{n_rows:,}, one a row"
        raise DimensionMismatch(f"{name} have shape {array.shape}, expected {expected}")
    given = ids if isinstance(ids, list | tuple) else array  # numpy drops NULs at the end, and makes strings of numbers
    if array.dtype.kind in "UO" and all(isinstance(value, str) for value in given):
        if bad := [value for value in given if not _is_storable(value)]:
            raise InvalidInput(f"{name} hold {bad[0]!r}, expected text that is not empty and has no NUL")
        return array.astype(np.str_)
    if array.dtype.kind not in "iu" and array.size:
        raise InvalidInput(f"{name} are {array.dtype}, expected integers or strings")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int64).max):
        raise InvalidInput(f"{name} hold {array.min()}, expected integers from 0 to 2^63 − 1")
    return array.astype(np.int64)


def _is_storable(value: str) -> bool:
    try:
        return "\0" not in value and value.encode() != b""
    except UnicodeEncodeError:
        return False


def as_count(name: str, value: Any) -> int:
    """A whole number ≥ 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise InvalidInput(f"{name} is {value!r}, expected a whole number of at least 1") from None
    if count < 1:
        raise InvalidInput(f"{name} is {count}, expected at least 1")
    return count


def as_positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = _as_number(name, value)
    if number <= 0:
        raise InvalidInput(f"{name} is {number:g}, expected a number above 0")
    return number


def as_fraction(name: str, value: Any, *, above_zero: bool = False) -> float:
    """A number from 0 to 1."""
    number = _as_number(name, value)
    if not 0 <= number <= 1 or (above_zero and number == 0):
        raise InvalidInput(f"{name} is {number:g}, expected a number {'above' if above_zero else 'from'} 0, up to 1")
    return number


def as_non_negative(name: str, value: Any) -> float:
    """A number from 0."""
    number = _as_number(name, value)
    if number < 0:
        raise InvalidInput(f"{name} is {number:g}, expected a number from 0")
    return number


def _as_number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name} is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise InvalidInput(f"{name} is {number}, expected a finite number")
    return number


def _as_floats(name: str, values: ArrayLike) -> Float[ndarray, "..."]:
    """Finite floating numbers of a usable size, in the precision that they came in (integers become float64)."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InvalidInput(f"{name} are not a plain array of numbers: {error}") from None
    if array.dtype.kind in "biu":
        array = array.astype(np.float64)
    if array.dtype.kind != "f":
        raise InvalidInput(f"{name} are {array.dtype}, expected floating numbers")
    if not array.size:
        return array
    if array.dtype == np.float16 and (array.view(np.uint16) & HALF_MAGNITUDE).max() < HALF_INFINITY:
        return array  # numpy compares halves one by one, their bits many at a time; no finite one is too large
    low, high = array.min(), array.max()
    if not np.isfinite(low) or not np.isfinite(high):
        bad = ~np.isfinite(array)
        place = ", ".join(map(str, np.argwhere(bad)[0]))
        raise InvalidInput(f"{name}[{place}] is {array[bad][0]}, expected finite numbers ({bad.sum():,} are not)")
    if max(abs(float(low)), abs(float(high))) > LARGEST_VALUE:
        largest = max(-float(low), float(high))
        raise InvalidInput(f"{name} hold values up to {largest:.3g}, expected at most {LARGEST_VALUE:g}: scale them")
    return array
