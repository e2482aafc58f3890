"""What an index will take before it is built: bytes by arithmetic, seconds by small builds that are scaled up."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray


@dataclass(frozen=True)
class Footprint:
    """Bytes that an index of so many rows takes.

    Attributes
    ----------
    engine : what the spec comes to for so many rows.
    ram : to search, as it is after it was loaded.
    saved : in files, where it is kept with its memory; 0 where there is nothing to save.
    building : RAM at the peak of building and saving it.
    """

    engine: str
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
    """

    training: float
    filling: float


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def seconds_per_row(call: Callable[[Float[ndarray, "b d"]], object], rows: Float[ndarray, "n d"], limit: float) -> float:
    """Seconds a row of a call on blocks of rows: of blocks that double until the rows or the time are used up."""
    size, spent, n_timed = min(64, len(rows)), 0.0, 0
    call(rows[:size])  # threads are started, pages touched
    start = 0
    while spent < limit and start < len(rows):
        block = rows[start : start + size]
        spent, n_timed = timed(lambda: call(block)), len(block)  # noqa: B023  called at once
        start, size = start + size, 2 * size
    return spent / n_timed


def example_keys(n_rows: int, dim: int) -> Float[ndarray, "n d"]:
    """Keys to time with: variances that fall as 1/i, as those of network layers do."""
    random = np.random.default_rng(0)
    scales = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    return random.standard_normal((n_rows, dim), np.float32) * scales
