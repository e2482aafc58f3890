"""Small data sets, and their true neighbours in plain numpy."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy import ndarray

from residual_memory.memory import Column


@dataclass(frozen=True)
class Problem:
    """Rows to remember, and queries with what the base says of them."""

    keys: ndarray
    labels: ndarray
    predictions: ndarray
    queries: ndarray
    said: ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def task(self) -> str:
        return "regression" if self.labels.dtype.kind == "f" else "classification"

    def rows(self, chosen: Any) -> "Problem":
        """The same queries against some of the rows."""
        return replace(self, keys=self.keys[chosen], labels=self.labels[chosen], predictions=self.predictions[chosen])


def softmax(logits: ndarray) -> ndarray:
    """Probabilities [n c]."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def classification(n: int = 60, q: int = 12, d: int = 5, c: int = 4, seed: int = 0) -> Problem:
    """Keys without structure, and a base that is sure of nothing."""
    random = np.random.default_rng(seed)
    return Problem(
        random.normal(size=(n, d)),
        random.integers(0, c, n),
        softmax(2 * random.normal(size=(n, c))),
        random.normal(size=(q, d)),
        softmax(2 * random.normal(size=(q, c))),
    )


def on_grid(problem: Problem, levels: int = 2) -> Problem:
    """Keys and queries on a coarse integer grid: full of duplicates and of equal distances."""
    random = np.random.default_rng(len(problem))
    return replace(
        problem,
        keys=random.integers(0, levels, problem.keys.shape).astype(float),
        queries=random.integers(0, levels, problem.queries.shape).astype(float),
    )


def column(*parts: ndarray) -> Column:
    """Keys as an index takes them, in as many segments as there are arrays."""
    return Column(list(parts), np.zeros((0, parts[0].shape[1])))


def clustered(n: int = 800, q: int = 40, d: int = 8, seed: int = 0) -> Problem:
    """Keys around a few centres far from the origin, in which float32 inner products lose digits."""
    random = np.random.default_rng(seed)
    centres = 3 * random.normal(size=(12, d)) + 50
    problem = classification(n=n, q=q, d=d, seed=seed)
    return replace(
        problem,
        keys=centres[random.integers(0, 12, n)] + problem.keys,
        queries=centres[random.integers(0, 12, q)] + problem.queries,
    )


def neighbors(keys: ndarray, queries: ndarray, k: int, ids: ndarray | None = None) -> tuple[ndarray, ndarray]:
    """Distances and rows [q k] of the nearest keys, ties by id."""
    ids = np.arange(len(keys)) if ids is None else ids
    differences = queries[:, None, :].astype(np.float64) - keys[None, :, :].astype(np.float64)
    distances = np.sqrt((differences**2).sum(axis=2))
    rows = np.array([np.lexsort((ids, line))[:k] for line in distances], np.int64).reshape(len(queries), -1)
    return np.take_along_axis(distances, rows, axis=1), rows


def same_bits(first: ndarray, second: ndarray) -> bool:
    """Whether two arrays are the same to the last bit, the sign of zero included."""
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
