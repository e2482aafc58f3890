"""What an index will take before it is built: bytes by arithmetic, seconds by small builds that are scaled up."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray


@dataclass(frozen=True)
class Footprint:
    """Bytes that an index of so many rows takes.

    Attributes
    ----------
    ram : to search, as it is after it was loaded.
    saved : in files, where it is kept with its memory; 0 where there is nothing to save.
    building : RAM at the peak of building and saving it.
    """

    ram: int
    saved: int
    building: int


@dataclass(frozen=True)
class BuildTime:
    """Seconds that building an index takes.

    Attributes
    ----------
    training : learning cells, codes and rotations.
    filling : adding the rows.
    measuring : its recall, by searching some queries among all rows; 0 where that is not done.
    """

    training: float
    filling: float
    measuring: float = 0.0


class ExampleKeys:
    """Made-up keys in RAM to time with: variances that fall as 1/i, as those of network layers do."""

    def __init__(self, whole: Float[ndarray, "n d"]) -> None:
        self.whole = whole
        self.dtype, self.width, self.n_parts = whole.dtype, whole.shape[1], 1

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, rows: Int64[ndarray, "..."]) -> Float[ndarray, "... d"]:
        return np.take(self.whole, rows, axis=0)

    def gathered(self, rows: Int64[ndarray, " m"]) -> tuple[Float[ndarray, "m d"], Int64[ndarray, " m"]]:
        return self.take(rows), np.arange(len(rows))

    def blocks(self, size: int, first: int = 0) -> Iterator[Float[ndarray, "b d"]]:
        return (self.whole[start : start + size] for start in range(first, len(self.whole), size))

    def opener(self, first: int, n_rows: int) -> "Callable[[], ExampleKeys]":
        return partial(ExampleKeys, self.whole[first : first + n_rows])


def example_keys(n_rows: int, dim: int) -> Float[ndarray, "n d"]:
    """The keys of `ExampleKeys`."""
    scales = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    return np.random.default_rng(0).standard_normal((n_rows, dim), np.float32) * scales


def extrapolated(
    build: Callable[[ExampleKeys, int], object], dim: int, n_rows: int, some: int, power: float = 1.0
) -> BuildTime:
    """Seconds of building an index, from those of two small ones: a part that stays and a part that grows.

    Parameters
    ----------
    build : of an index over so many of the keys, the first ones.
    some : rows of the larger of the two; the other has half as many.
    power : of the rows, with which the second part grows.
    """
    keys = ExampleKeys(example_keys(some, dim))
    build(keys, some // 2)  # threads are started, pages touched
    half, whole = timed(lambda: build(keys, some // 2)), timed(lambda: build(keys, some))
    grown = max(whole - half, 0.0) / (1 - 0.5**power)  # what grows, of `some` rows
    return BuildTime(max(whole - grown, 0.0), grown * (n_rows / some) ** power)


def timed(call: Callable[[], object], times: int = 1) -> float:
    """Seconds that a call takes: the least of several, since what else the machine does only adds to them."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def seconds_per_row(
    call: Callable[[Float[ndarray, "b d"]], object], rows: Float[ndarray, "n d"], limit: float
) -> float:
    """Seconds a row of a call on blocks of rows: of blocks that double until the rows or the time are used up."""
    size, spent, least = min(64, len(rows)), 0.0, float("inf")
    call(rows[:size])  # threads are started, pages touched
    start = 0
    while spent < limit and start < len(rows):
        block = rows[start : start + size]
        spent = timed(lambda: call(block))  # noqa: B023  called at once
        least = min(least, spent / len(block))
        start, size = start + size, 2 * size
    return least
